"""``llmc.append`` on any GPU: the step's keys and values to their slots of the paged cache, in place, a vector a thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.gpu.emit import (
    WIDTH,
    Symbols,
    arguments,
    bind,
    common_lanes,
    flat,
    function,
    i64,
    load,
    storable,
    store_all,
    when,
)
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.append"
OP = "llmc.append"


def _call(heads: int, d: int, dv: int, page_size: int, dtype: str = "bfloat16", kv_dtype: str = "bfloat16") -> KernelCall:
    pages = TensorSpec(("num_pages", heads, page_size * (d + dv)), kv_dtype)
    k, v = TensorSpec(("n", heads, d), dtype), TensorSpec(("n", heads, dv), dtype)
    return KernelCall(OP, (k, v, TensorSpec(("n",), "int32"), pages), pages, (("page_size", page_size),))


SHAPES: dict[str, KernelCall] = {
    "heads_8x128": _call(8, 128, 128, 16),
    "odd_20_12_f32": _call(2, 20, 12, 5, "float32", "float32"),
    "f16_80": _call(1, 80, 80, 16, "float16", "float16"),
    "narrowed_96_57": _call(3, 96, 57, 3, "float32", "bfloat16"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not storable(call, target, ints=(2,)):
        return None
    return f"rows copied to {call.args[3].dtype} pages, a vector a thread"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    heads, d = (int(x) for x in call.args[0].shape[1:])
    dv, page_size = int(call.args[1].shape[2]), int(call.attr("page_size"))
    lanes = common_lanes(target, [call.args[i].dtype for i in (0, 1, 3)], d, dv)
    pieces = (d + dv) // lanes
    with function(f"append_{heads}x{d}") as done:
        k, v, slots, pages = arguments(symbols, k=call.args[0], v=call.args[1], slot_mapping=call.args[2], kv_pages=call.args[3])

        def item(i: Expr) -> None:
            at, head_row = bind(tirx.floormod(i, pieces) * lanes), bind(tirx.floordiv(i, pieces))
            head, row = bind(tirx.floormod(head_row, heads)), bind(tirx.floordiv(head_row, heads))
            slot = bind(i64(slots[row]))
            # Quotients of a negative slot would be out of range even where nothing is stored: TVM may load ahead of the test.
            page = bind(tirx.floordiv(tirx.max(slot, i64(0)), page_size))
            offset = bind(tirx.floormod(tirx.max(slot, i64(0)), page_size))

            def key() -> None:
                store_all(pages, load(k, row, head, at, lanes=lanes), page, head, offset * d + at)

            def value() -> None:
                store_all(pages, load(v, row, head, at - d, lanes=lanes), page, head, page_size * d + offset * dv + (at - d))

            when(slot >= 0, lambda: when(at < d, key, value))

        flat(target, symbols.dim(call.args[0].shape[0]) * (heads * pieces), item)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import append_reference

    k, v, slots, pages = arrays
    return append_reference(k, v, slots, pages, page_size=call.attr("page_size"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    width = WIDTH[call.args[0].dtype] + WIDTH[call.args[3].dtype]
    return sum(int(np.prod(a.bind(symbols))) for a in call.args[:2]) * width, 0
