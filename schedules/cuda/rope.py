"""``llmc.rope`` on a GPU: a thread turns up to 16 bytes of a head, halves or pairs, in float32."""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm import tirx

from llmc.schedules.cuda.emit import (
    STORAGE,
    Symbols,
    arguments,
    bind,
    common_lanes,
    flat,
    function,
    load,
    store_all,
    when,
)
from llmc.schedules.gpu import rope as portable
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.rope"
OP = "llmc.rope"


SHAPES = portable.SHAPES


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cuda" or any(a.dtype not in STORAGE for a in call.args):
        return None
    return "pairs within a thread" if call.attr("interleaved") else "both halves in one thread"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    heads, d = (int(v) for v in call.args[0].shape[1:])
    rotary, pairs = int(call.attr("rotary_dim")), bool(call.attr("interleaved"))
    span = rotary if pairs else rotary // 2
    # One width for all loads: it divides the turned part, every offset in a row, and the row's length.
    lanes = common_lanes([a.dtype for a in call.args], gcd(span, d, rotary))
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

        flat(symbols.dim(call.args[0].shape[0]) * (heads * items), item)
    return done()


reference, roofline = portable.reference, portable.roofline
