"""``llmc.append`` on a CPU: the step's keys and values to their slots of the paged cache, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, each_vector, function, i64, parallel_if, store, when
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.append"
OP = "llmc.append"
STORAGE = ("float32", "float16", "bfloat16")


def _call(heads: int, d: int, dv: int, page_size: int, dtype: str = "float32") -> KernelCall:
    pages = TensorSpec(("num_pages", heads, page_size * (d + dv)), dtype)
    k, v = TensorSpec(("n", heads, d), "float32"), TensorSpec(("n", heads, dv), "float32")
    return KernelCall(OP, (k, v, TensorSpec(("n",), "int32"), pages), pages, (("page_size", page_size),))


SHAPES: dict[str, KernelCall] = {
    "smollm2": _call(3, 64, 64, 16),
    "odd_20_12": _call(2, 20, 12, 5),
    "f16_80": _call(1, 80, 80, 16, "float16"),
    "bf16_96_57": _call(3, 96, 57, 3, "bfloat16"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.args[3].dtype not in STORAGE:
        return None
    if any(a.dtype != "float32" for a in call.args[:2]):
        return None
    return f"rows copied to {call.args[3].dtype} pages"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    heads, d = (int(x) for x in call.args[0].shape[1:])
    dv, page_size = int(call.args[1].shape[2]), int(call.attr("page_size"))
    with function(f"append_{heads}x{d}") as done:
        k, v, slots, pages = arguments(symbols, k=call.args[0], v=call.args[1], slot_mapping=call.args[2], kv_pages=call.args[3])
        n = symbols.dim(call.args[0].shape[0])

        def row(t: Expr) -> None:
            i, head = bind(tirx.floordiv(i64(t), heads)), bind(tirx.floormod(i64(t), heads))
            slot = bind(i64(slots[i]))

            def copy(source: Expr, width: int, base: int) -> None:
                page, offset = bind(tirx.floordiv(slot, page_size)), bind(tirx.floormod(slot, page_size))

                def piece(start: Expr, lanes: int) -> None:
                    value = simd.narrow(simd.load(source, i, head, start, lanes=lanes), call.args[3].dtype, lanes)
                    store(pages, value, page, head, base + offset * width + start, lanes=lanes)

                each_vector(width, simd.lanes, piece)

            def both() -> None:
                copy(k, d, 0)
                copy(v, dv, page_size * d)

            when(slot >= 0, both)

        parallel_if(n * heads, d + dv, row)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import append_reference

    k, v, slots, pages = arrays
    return append_reference(k, v, slots, pages, page_size=call.attr("page_size"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[call.args[3].dtype]
    values = sum(int(np.prod(a.bind(symbols))) for a in call.args[:2])
    return values * (4 + width), 0
