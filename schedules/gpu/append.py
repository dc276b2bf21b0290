"""``llmc.append`` on any GPU: the step's keys and values to their slots of the paged cache, in place, a vector a thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.kv_layout import scheme_attr
from llmc.schedules.gpu.emit import (
    WIDTH,
    Symbols,
    Team,
    arguments,
    bind,
    ceildiv,
    common_lanes,
    flat,
    function,
    i64,
    launch,
    load,
    storable,
    store_all,
    when,
)
from llmc.schedules.gpu.kv_codes import Side, team_size
from llmc.schedules.kv_pages import page_layout_of, pages_spec, slot_bytes, stored_as
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.append"
OP = "llmc.append"
THREADS = 128


def _call(heads: int, d: int, dv: int, page_size: int, dtype: str = "bfloat16", kv_dtype: str = "bfloat16") -> KernelCall:
    pages = pages_spec(kv_dtype, heads, page_size, d, dv)
    k, v = TensorSpec(("n", heads, d), dtype), TensorSpec(("n", heads, dv), dtype)
    attrs = {"page_size": page_size, **scheme_attr(kv_dtype)}
    return KernelCall(OP, (k, v, TensorSpec(("n",), "int32"), pages), pages, tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "heads_8x128": _call(8, 128, 128, 16),
    "odd_20_12_f32": _call(2, 20, 12, 5, "float32", "float32"),
    "f16_80": _call(1, 80, 80, 16, "float16", "float16"),
    "narrowed_96_57": _call(3, 96, 57, 3, "float32", "bfloat16"),
    "int4_80_57": _call(2, 80, 57, 3, "float16", "int4"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not storable(call, target, ints=(2,), pages=3):
        return None
    how = "a group of threads for each" if "kv_scheme" in dict(call.attrs) else "a vector a thread"
    return f"rows copied to {stored_as(call, call.args[3])} pages, {how}"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    heads, d = (int(x) for x in call.args[0].shape[1:])
    with function(f"append_{heads}x{d}") as done:
        k, v, slots, pages = arguments(symbols, k=call.args[0], v=call.args[1], slot_mapping=call.args[2], kv_pages=call.args[3])
        n = symbols.dim(call.args[0].shape[0])
        copy = _copy if page_layout_of(call, call.args[3], d, int(call.args[1].shape[2])).scheme is None else _quantize
        copy(call, target, n, k, v, slots, pages)
    return done()


def _copy(call: KernelCall, target: GpuTarget, n: Expr, k: Expr, v: Expr, slots: Expr, pages: Expr) -> None:
    heads, d = (int(x) for x in call.args[0].shape[1:])
    dv, page_size = int(call.args[1].shape[2]), int(call.attr("page_size"))
    lanes = common_lanes(target, [call.args[i].dtype for i in (0, 1, 3)], d, dv)
    pieces = (d + dv) // lanes

    def item(i: Expr) -> None:
        at, head_row = bind(tirx.floormod(i, pieces) * lanes), bind(tirx.floordiv(i, pieces))
        head, row = bind(tirx.floormod(head_row, heads)), bind(tirx.floordiv(head_row, heads))
        slot = bind(i64(slots[row]))
        page, offset = _place(slot, page_size)

        def key() -> None:
            store_all(pages, load(k, row, head, at, lanes=lanes), page, head, offset * d + at)

        def value() -> None:
            store_all(pages, load(v, row, head, at - d, lanes=lanes), page, head, page_size * d + offset * dv + (at - d))

        when(slot >= 0, lambda: when(at < d, key, value))

    flat(target, n * (heads * pieces), item)


def _quantize(call: KernelCall, target: GpuTarget, n: Expr, k: Expr, v: Expr, slots: Expr, pages: Expr) -> None:
    """A group of threads has a head of a row, its key and then its value."""
    heads, d = (int(x) for x in call.args[0].shape[1:])
    dv, page_size = int(call.args[1].shape[2]), int(call.attr("page_size"))
    layout = page_layout_of(call, call.args[3], d, dv)
    group = team_size(target, max(d, dv))
    with launch(ceildiv(n * heads, THREADS // group), THREADS) as (thread, block):
        at = bind(block * (THREADS // group) + i64(tirx.floordiv(thread, group)))
        # A group without a head works on the last one, so that all threads take part.
        inside = bind(tirx.min(at, n * heads - 1))
        row, head = bind(tirx.floordiv(inside, heads)), bind(tirx.floormod(inside, heads))
        slot = bind(i64(slots[row]))
        page, offset = _place(slot, page_size)
        active = bind(tirx.all(at < n * heads, slot >= 0))
        team = Team(target, thread, THREADS, group)
        for source, keys in ((k, True), (v, False)):

            def element(e: Expr, source: Expr = source) -> Expr:
                return load(source, row, head, e)[0]

            Side(target, pages, layout, keys=keys).write(team, group, active, page, head, offset, element)


def _place(slot: Expr, page_size: int) -> tuple[Expr, Expr]:
    """Page, and slot in it."""
    # Quotients of a negative slot would be out of range even where nothing is stored: TVM may load ahead of the test.
    positive = bind(tirx.max(slot, i64(0)))
    return bind(tirx.floordiv(positive, page_size)), bind(tirx.floormod(positive, page_size))


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import append_reference

    k, v, slots, pages = arrays
    return append_reference(k, v, slots, pages, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    rows = int(np.prod(call.args[0].bind(symbols)[:2]))
    d, dv = (int(a.shape[2]) for a in call.args[:2])
    return rows * (WIDTH[call.args[0].dtype] * (d + dv) + slot_bytes(call, call.args[3], d, dv)), 0
