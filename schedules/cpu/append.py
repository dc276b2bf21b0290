"""``llmc.append`` on a CPU: the step's keys and values to their slots of the paged cache, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.kv_layout import scheme_attr
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, function, i64, parallel_if, when
from llmc.schedules.cpu.kv_codes import Side
from llmc.schedules.kv_pages import page_layout_of, pages_spec, slot_bytes, stored_as
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.append"
OP = "llmc.append"
WORK = 8
"""Operations to quantize an element."""


def _call(heads: int, d: int, dv: int, page_size: int, kv_dtype: str = "float32") -> KernelCall:
    pages = pages_spec(kv_dtype, heads, page_size, d, dv)
    k, v = TensorSpec(("n", heads, d), "float32"), TensorSpec(("n", heads, dv), "float32")
    attrs = {"page_size": page_size, **scheme_attr(kv_dtype)}
    return KernelCall(OP, (k, v, TensorSpec(("n",), "int32"), pages), pages, tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "smollm2": _call(3, 64, 64, 16),
    "odd_20_12": _call(2, 20, 12, 5),
    "f16_80": _call(1, 80, 80, 16, "float16"),
    "bf16_96_57": _call(3, 96, 57, 3, "bfloat16"),
    "int8_96_57": _call(3, 96, 57, 3, "int8"),
    "fp8_20_12": _call(2, 20, 12, 5, "fp8_e4m3"),
    "int4_80_57": _call(2, 80, 57, 3, "int4"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu":
        return None
    stored = stored_as(call, call.args[3])
    if stored is None or any(a.dtype != "float32" for a in call.args[:2]):
        return None
    return f"rows copied to {stored} pages"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    heads, d = (int(x) for x in call.args[0].shape[1:])
    dv, page_size = int(call.args[1].shape[2]), int(call.attr("page_size"))
    layout = page_layout_of(call, call.args[3], d, dv)
    with function(f"append_{heads}x{d}") as done:
        k, v, slots, pages = arguments(symbols, k=call.args[0], v=call.args[1], slot_mapping=call.args[2], kv_pages=call.args[3])
        n = symbols.dim(call.args[0].shape[0])

        sides = [(k, Side(simd, pages, layout, keys=True)), (v, Side(simd, pages, layout, keys=False))]

        def row(t: Expr) -> None:
            i, head = bind(tirx.floordiv(i64(t), heads)), bind(tirx.floormod(i64(t), heads))
            slot = bind(i64(slots[i]))

            def both() -> None:
                page, offset = bind(tirx.floordiv(slot, page_size)), bind(tirx.floormod(slot, page_size))
                for source, side in sides:

                    def load(start: Expr, lanes: int, source: Expr = source) -> Expr:
                        return simd.load(source, i, head, start, lanes=lanes)

                    side.write(page, head, offset, load)

            when(slot >= 0, both)

        parallel_if(n * heads, (d + dv) * (WORK if layout.scheme else 1), row)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import append_reference

    k, v, slots, pages = arrays
    return append_reference(k, v, slots, pages, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    rows = int(np.prod(call.args[0].bind(symbols)[:2]))
    d, dv = (int(a.shape[2]) for a in call.args[:2])
    return rows * (4 * (d + dv) + slot_bytes(call, call.args[3], d, dv)), 0
