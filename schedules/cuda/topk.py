"""``llmc.topk`` on a GPU: one warp a row, k passes, each for the largest element after the one found before.

A router's row has at most a few hundred elements and k is small: the row stays in the registers of the warp.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from llmc.schedules.cuda.emit import (
    STORAGE,
    WARP,
    Symbols,
    arguments,
    bind,
    each,
    f32,
    function,
    lane_max,
    launch,
    load,
    registers,
    store,
    when,
)
from llmc.schedules.gpu import topk as portable
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.topk"
OP = "llmc.topk"


SHAPES = portable.SHAPES


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cuda" or call.args[0].dtype not in STORAGE:
        return None
    return "one warp a row, k passes"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    elements, k = int(call.args[0].shape[1]), int(call.attr("k"))
    steps = -(-elements // WARP)
    with function(f"topk_{k}_of_{elements}") as done:
        x, ids = arguments(symbols, x=call.args[0], ids=call.result)
        with launch(symbols.dim(call.args[0].shape[0]), WARP) as (lane, row):
            held = registers(steps)
            for step in range(steps):
                store(held, f32(float("-inf")), step)

            def keep(item: Expr, step: int) -> None:
                store(held, load(x, row, item)[0], step)

            each(lane, WARP, elements, keep)
            # What the previous pass found: everything of this pass comes after it in the order (value down, index up).
            last_value, last_index = registers(1), registers(1, "int32")
            best_value, best_index = registers(1), registers(1, "int32")
            store(last_value, f32(float("inf")), 0)
            store(last_index, tirx.const(-1, "int32"), 0)
            for j in range(k):
                store(best_value, f32(float("-inf")), 0)
                store(best_index, tirx.const(elements, "int32"), 0)

                def look(item: Expr, step: int) -> None:
                    value, index = bind(held[step]), bind(tirx.Cast("int32", item))
                    after = tirx.any(value < last_value[0], tirx.all(value.equal(last_value[0]), index > last_index[0]))
                    # A lane meets its elements in the order of their indices; -inf still beats the empty start.
                    better = tirx.any(value > best_value[0], best_index[0].equal(elements))

                    def take() -> None:
                        store(best_value, value, 0)
                        store(best_index, index, 0)

                    when(tirx.all(after, better), take)

                each(lane, WARP, elements, look)
                value, index = lane_max(best_value[0], best_index[0])
                store(last_value, value, 0)
                store(last_index, index, 0)
                when(lane.equal(0), lambda index=index, j=j: store(ids, index, row, j))  # type: ignore[misc]
    return done()


reference, roofline = portable.reference, portable.roofline
