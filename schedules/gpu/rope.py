"""``llmc.rope`` on any GPU: a thread turns one vector of a head, halves or pairs, in float32."""

from __future__ import annotations

from math import gcd
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
    load,
    storable,
    store_all,
    when,
)
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.rope"
OP = "llmc.rope"


def _call(heads: int, d: int, rotary: int, interleaved: int = 0, dtype: str = "bfloat16", table: str = "float32") -> KernelCall:
    x, angle = TensorSpec(("n", heads, d), dtype), TensorSpec(("n", rotary), table)
    return KernelCall(OP, (x, angle, angle), x, (("interleaved", interleaved), ("rotary_dim", rotary)))


SHAPES: dict[str, KernelCall] = {
    "heads_32x128": _call(32, 128, 128),
    "bf16_table_8x64": _call(8, 64, 64, 0, "bfloat16", "bfloat16"),
    "partial_80_of_96": _call(2, 96, 80, 0, "float16"),
    "odd_20": _call(3, 20, 20, 0, "float32"),
    "pairs_64": _call(2, 64, 64, 1),
    "pairs_partial_12_of_21": _call(1, 21, 12, 1, "float32"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not storable(call, target):
        return None
    return "pairs within a thread" if call.attr("interleaved") else "both halves in one thread"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    heads, d = (int(v) for v in call.args[0].shape[1:])
    rotary, pairs = int(call.attr("rotary_dim")), bool(call.attr("interleaved"))
    span = rotary if pairs else rotary // 2
    # One width for all loads: it divides the turned part, every offset in a row, and the row's length.
    lanes = common_lanes(target, [a.dtype for a in call.args], gcd(span, d, rotary))
    # A thread turns whole pairs, by two loads where the rows are not even aligned to pairs.
    unit = max(lanes, 2) if pairs else lanes
    turned, rest = span // unit, (d - rotary) // lanes
    items = turned + rest
    with function(f"rope_{heads}x{d}") as done:
        x, cos, sin, out = arguments(symbols, x=call.args[0], cos=call.args[1], sin=call.args[2], out=call.result)

        def item(i: Expr) -> None:
            piece, head_row = bind(tirx.floormod(i, items)), bind(tirx.floordiv(i, items))
            head, row = bind(tirx.floormod(head_row, heads)), bind(tirx.floordiv(head_row, heads))

            def halves() -> None:
                first, second = piece * lanes, piece * lanes + span
                a, b = (load(x, row, head, at, lanes=lanes) for at in (first, second))
                for own, other, at in ((a, [-v for v in b], first), (b, a, second)):
                    c, s = load(cos, row, at, lanes=lanes), load(sin, row, at, lanes=lanes)
                    store_all(out, [own[j] * c[j] + other[j] * s[j] for j in range(lanes)], row, head, at)

            def neighbours() -> None:
                at = piece * unit

                def whole(buffer: Expr, *index: Expr) -> list[Expr]:
                    return [e for part in range(0, unit, lanes) for e in load(buffer, *index, at + part, lanes=lanes)]

                v, c, s = whole(x, row, head), whole(cos, row), whole(sin, row)
                other = [v[j - 1] if j % 2 else -v[j + 1] for j in range(unit)]
                result = [v[j] * c[j] + other[j] * s[j] for j in range(unit)]
                for part in range(0, unit, lanes):
                    store_all(out, result[part : part + lanes], row, head, at + part)

            def passed() -> None:
                at = rotary + (piece - turned) * lanes
                store_all(out, load(x, row, head, at, lanes=lanes), row, head, at)

            turn = neighbours if pairs else halves
            if rest:
                when(piece < turned, turn, passed)
            else:
                turn()

        flat(target, symbols.dim(call.args[0].shape[0]) * (heads * items), item)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.rope import reference as rope_reference

    return rope_reference(*arrays, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    x, cos, sin = (int(np.prod(a.bind(symbols))) * WIDTH[a.dtype] for a in call.args)
    return 2 * x + cos + sin, 3 * int(np.prod(call.args[0].bind(symbols)))
