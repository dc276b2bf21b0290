"""``llmc.advance``: make the step arrays of a decode step those of the next one, on the device.

The tokens become the next inputs, positions and lengths go up by one, and the slot of the new position comes from the block table.
Input ids, positions and lengths are written in place; the slots are the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.gpu.emit import Symbols, arguments, bind, flat, function, i64, store
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

NAME = "cuda.advance"
OP = "llmc.advance"


def _call(page_size: int) -> KernelCall:
    row = TensorSpec(("n",), "int32")
    return KernelCall(OP, (row, row, row, row, TensorSpec(("n", "m"), "int32")), row, (("page_size", page_size),), "advance")


SHAPES: dict[str, KernelCall] = {"page_16": _call(16), "page_5": _call(5)}


def matches(call: KernelCall, target: Target) -> str | None:
    return "a thread a row" if call.op == OP and target.kind == "cuda" else None


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    """Arguments: tokens, input_ids, positions, seq_lens, block_table, and the result slot_mapping."""
    symbols, page_size = Symbols(), int(call.attr("page_size"))
    names = ("tokens", "input_ids", "positions", "seq_lens", "block_table")
    with function(f"advance_page_{page_size}") as done:
        tokens, ids, positions, lens, table, slots = arguments(
            symbols, **dict(zip(names, call.args, strict=True)), slot_mapping=call.result
        )

        def step(i: Any) -> None:
            position = bind(positions[i] + 1)
            # A token of -1 says that there was none to choose: the host stops reading there, and the row goes on with any.
            store(ids, tirx.max(tokens[i], 0), i)
            store(positions, position, i)
            store(lens, lens[i] + 1, i)
            # Beyond the table there are no positions; the last page stands in, so that nothing outside is read.
            last = tirx.Cast("int32", symbols.dim("m")) - 1
            page = bind(tirx.min(tirx.floordiv(position, page_size), last))
            store(slots, table[i, i64(page)] * page_size + tirx.floormod(position, page_size), i)

        flat(target, symbols.dim("n"), step)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    """The slots; the other results are the tokens themselves and increments."""
    positions, table = arrays[2] + 1, arrays[4]
    page_size = int(call.attr("page_size"))
    page = np.minimum(positions // page_size, table.shape[1] - 1)
    found: np.ndarray = table[np.arange(len(positions)), page] * page_size + positions % page_size
    return found.astype(np.int32)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    return 4 * 9 * symbols["n"], 4 * symbols["n"]
