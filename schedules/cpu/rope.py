"""``llmc.rope`` on a CPU: both halves of a rotation at once; pairs (interleaved) by shuffles within a vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.cpu.emit import (
    Simd,
    Symbols,
    arguments,
    bind,
    each_vector,
    function,
    i64,
    parallel_if,
    shuffle,
    store,
)  # fmt: skip
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.rope"
OP = "llmc.rope"


def _call(heads: int, d: int, rotary: int, interleaved: int = 0) -> KernelCall:
    x, angle = TensorSpec(("n", heads, d), "float32"), TensorSpec(("n", rotary), "float32")
    return KernelCall(OP, (x, angle, angle), x, (("interleaved", interleaved), ("rotary_dim", rotary)))


SHAPES: dict[str, KernelCall] = {
    "smollm2": _call(9, 64, 64),
    "partial_80_of_96": _call(2, 96, 80),
    "odd_20": _call(3, 20, 20),
    "pairs_64": _call(2, 64, 64, 1),
    "pairs_partial_12_of_21": _call(1, 21, 12, 1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or any(a.dtype != "float32" for a in call.args):
        return None
    return "pairs within vectors" if call.attr("interleaved") else "halves side by side"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    heads, d = (int(v) for v in call.args[0].shape[1:])
    rotary = int(call.attr("rotary_dim"))
    with function(f"rope_{heads}x{d}") as done:
        x, cos, sin, out = arguments(symbols, x=call.args[0], cos=call.args[1], sin=call.args[2], out=call.result)

        def row(t: Expr) -> None:
            i, head = bind(tirx.floordiv(i64(t), heads)), bind(tirx.floormod(i64(t), heads))

            def halves(start: Expr, lanes: int) -> None:
                second = start + rotary // 2
                a = bind(simd.load(x, i, head, start, lanes=lanes))
                b = bind(simd.load(x, i, head, second, lanes=lanes))

                def turned(own: Expr, other: Expr, at: Expr) -> Expr:
                    c, s = simd.load(cos, i, at, lanes=lanes), simd.load(sin, i, at, lanes=lanes)
                    return simd.fma(own, c, bind(other * s))

                store(out, turned(a, simd.splat(0.0, lanes) - b, start), i, head, start, lanes=lanes)
                store(out, turned(b, a, second), i, head, second, lanes=lanes)

            def pairs(start: Expr, lanes: int) -> None:
                v = bind(simd.load(x, i, head, start, lanes=lanes))
                swapped = bind(shuffle([v], [lane ^ 1 for lane in range(lanes)]))
                even = tirx.floormod(tirx.Ramp(0, 1, lanes), tirx.Broadcast(tirx.const(2, "int32"), lanes))
                even = even.equal(tirx.Broadcast(tirx.const(0, "int32"), lanes))
                swapped = tirx.Select(even, simd.splat(0.0, lanes) - swapped, swapped)
                c, s = simd.load(cos, i, start, lanes=lanes), simd.load(sin, i, start, lanes=lanes)
                store(out, simd.fma(v, c, bind(swapped * s)), i, head, start, lanes=lanes)

            def rest(start: Expr, lanes: int) -> None:
                store(out, simd.load(x, i, head, rotary + start, lanes=lanes), i, head, rotary + start, lanes=lanes)

            if call.attr("interleaved"):
                each_vector(rotary, simd.lanes, pairs)
            else:
                each_vector(rotary // 2, simd.lanes, halves)
            if d > rotary:
                each_vector(d - rotary, simd.lanes, rest)

        parallel_if(symbols.dim(call.args[0].shape[0]) * heads, 2 * d, row)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.rope import reference as rope_reference

    return rope_reference(*arrays, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    size = int(np.prod(call.args[0].bind(symbols)))
    angles = 2 * int(np.prod(call.args[1].bind(symbols)))
    return 4 * (2 * size + angles), 3 * size
