"""``llmc.topk`` on any GPU: one warp a row, k passes, each for the largest element after the one found before.

A router's row has at most a few hundred elements and k is small: the row stays in the registers of the warp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.gpu.emit import (
    WIDTH,
    Symbols,
    Team,
    arguments,
    bind,
    each,
    f32,
    function,
    launch,
    load,
    registers,
    storable,
    store,
    when,
)
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.topk"
OP = "llmc.topk"


def _call(elements: int, k: int, dtype: str = "float32") -> KernelCall:
    return KernelCall(OP, (TensorSpec(("n", elements), dtype),), TensorSpec(("n", k), "int32"), (("k", k),))


SHAPES: dict[str, KernelCall] = {
    "8_of_128": _call(128, 8),
    "2_of_8_bf16": _call(8, 2, "bfloat16"),
    "3_of_5": _call(5, 3, "float16"),
    "all_of_37": _call(37, 37),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not storable(call, target):
        return None
    return "one warp a row, k passes"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    elements, k = int(call.args[0].shape[1]), int(call.attr("k"))
    warp = target.warp_size
    steps = -(-elements // warp)
    with function(f"topk_{k}_of_{elements}") as done:
        x, ids = arguments(symbols, x=call.args[0], ids=call.result)
        with launch(symbols.dim(call.args[0].shape[0]), warp) as (lane, row):
            team, held = Team(target, lane, warp), registers(steps, start=float("-inf"))

            def keep(item: Expr, step: int) -> None:
                store(held, load(x, row, item)[0], step)

            each(lane, warp, elements, keep)
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

                each(lane, warp, elements, look)
                value, index = team.best(best_value[0], best_index[0], warp)
                store(last_value, value, 0)
                store(last_index, index, 0)
                when(lane.equal(0), lambda index=index, j=j: store(ids, index, row, j))  # type: ignore[misc]
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.topk import reference as topk_reference

    return topk_reference(*arrays, k=call.attr("k"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    n, elements = call.args[0].bind(symbols)
    k = int(call.attr("k"))
    return n * (WIDTH[call.args[0].dtype] * elements + 4 * k), n * k * elements
