"""``llmc.row_starts`` on a CPU: a few numbers a step, counted one by one by one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Symbols, arguments, function, local, store
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.row_starts"
OP = "llmc.row_starts"


def _call() -> KernelCall:
    args = (TensorSpec(("n",), "int32"), TensorSpec(("b+1",), "int32"), TensorSpec(("b",), "int32"))
    return KernelCall(OP, args, TensorSpec(("b+1",), "int32"))


SHAPES: dict[str, KernelCall] = {"any": _call()}


def matches(call: KernelCall, target: Target) -> str | None:
    return "one by one" if call.op == OP and target.kind == "cpu" else None


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    with function("row_starts") as done:
        rows, q_indptr, _, starts = operands(symbols, call)
        with T.serial(0, symbols.dim(call.result.shape[0])) as s:
            start(rows, symbols.dim(call.args[0].shape[0]), q_indptr, starts, s, local(1, dtype="int32"))
    return done()


def operands(symbols: Symbols, call: KernelCall) -> list[Expr]:
    logit_rows, q_indptr, seq_lens = call.args
    return arguments(symbols, logit_rows=logit_rows, q_indptr=q_indptr, seq_lens=seq_lens, starts=call.result)


def start(rows: Expr, count: Expr, q_indptr: Expr, starts: Expr, s: Expr, found: Expr) -> None:
    """starts[s]: how many of ``count`` rows are before q_indptr[s]. ``found``: a register."""
    zero = tirx.const(0, "int64")
    store(found, tirx.const(0, "int32"), zero)
    with T.serial(0, count) as i:
        store(found, found[zero] + tirx.Cast("int32", rows[i] < q_indptr[s]), zero)
    store(starts, found[zero], s)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.row_starts import reference as row_starts_reference

    return row_starts_reference(*arrays)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    return 4 * (symbols["n"] + 2 * symbols["b"] + 2), symbols["n"] * (symbols["b"] + 1)
