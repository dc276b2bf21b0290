"""``llmc.topk`` on a CPU: k passes over a row, each for the largest element after the one found before. Rows in parallel.

A router's row has at most a few hundred elements and k is small, so k passes over a row in L1 beat any data structure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Symbols, arguments, bind, f32, function, local, parallel_if, store, when
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.topk"
OP = "llmc.topk"


def _call(elements: int, k: int) -> KernelCall:
    return KernelCall(OP, (TensorSpec(("n", elements), "float32"),), TensorSpec(("n", k), "int32"), (("k", k),))


SHAPES: dict[str, KernelCall] = {"8_of_128": _call(128, 8), "2_of_8": _call(8, 2), "3_of_5": _call(5, 3), "all_of_7": _call(7, 7)}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.args[0].dtype != "float32":
        return None
    return "k passes over a short row"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    elements, k = int(call.args[0].shape[1]), int(call.attr("k"))
    with function(f"topk_{k}_of_{elements}") as done:
        x, ids = arguments(symbols, x=call.args[0], ids=call.result)

        def row(i: Expr) -> None:
            # What the previous pass found: everything of this pass comes after it in the order (value down, index up).
            last_value, last_index = local(1), local(1, dtype="int32")
            best_value, best_index = local(1), local(1, dtype="int32")
            zero = tirx.const(0, "int64")
            store(last_value, f32(float("inf")), zero)
            store(last_index, tirx.const(-1, "int32"), zero)
            with T.serial(0, k) as j:
                store(best_value, f32(float("-inf")), zero)
                store(best_index, tirx.const(-1, "int32"), zero)
                with T.serial(0, elements) as e:
                    value = bind(x[i, e])
                    index = tirx.Cast("int32", e)
                    after = tirx.any(value < last_value[zero], tirx.all(value.equal(last_value[zero]), index > last_index[zero]))

                    def take(value: Expr = value, index: Expr = index) -> None:
                        store(best_value, value, zero)
                        store(best_index, index, zero)

                    # The first that comes after is taken whatever it is: no value is larger than minus infinity, if that is all.
                    when(tirx.all(after, tirx.any(value > best_value[zero], best_index[zero] < 0)), take)
                store(last_value, best_value[zero], zero)
                store(last_index, best_index[zero], zero)
                store(ids, tirx.max(best_index[zero], 0), i, j)  # a row of NaN has none, and an index must be one

        parallel_if(symbols.dim(call.args[0].shape[0]), k * elements, row)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.topk import reference as topk_reference

    return topk_reference(*arrays, k=call.attr("k"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    n, elements = call.args[0].bind(symbols)
    k = int(call.attr("k"))
    return 4 * n * (elements + k), n * k * elements
