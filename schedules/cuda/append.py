"""``llmc.append`` on a GPU: the step's keys and values to their slots of the paged cache, in place, 16 bytes a thread."""

from __future__ import annotations

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
    i64,
    load,
    store_all,
    when,
)
from llmc.schedules.gpu import append as portable
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.append"
OP = "llmc.append"


SHAPES = portable.SHAPES


def matches(call: KernelCall, target: Target) -> str | None:
    k, v, _, pages = call.args
    if call.op != OP or target.kind != "cuda" or any(a.dtype not in STORAGE for a in (k, v, pages)):
        return None
    return f"rows copied to {pages.dtype} pages, 16 bytes a thread"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    heads, d = (int(x) for x in call.args[0].shape[1:])
    dv, page_size = int(call.args[1].shape[2]), int(call.attr("page_size"))
    lanes = common_lanes([call.args[i].dtype for i in (0, 1, 3)], d, dv)
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

        flat(symbols.dim(call.args[0].shape[0]) * (heads * pieces), item)
    return done()


reference, roofline = portable.reference, portable.roofline
