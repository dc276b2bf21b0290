"""``llmc.row_starts`` on any GPU: a thread counts for each sequence."""

from __future__ import annotations

from typing import Any

from llmc.schedules.cpu import row_starts as cpu
from llmc.schedules.gpu.emit import Symbols, flat, function, registers
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

NAME = "gpu.row_starts"
OP, SHAPES = cpu.OP, cpu.SHAPES


def matches(call: KernelCall, target: Target) -> str | None:
    return "a thread a sequence" if call.op == OP and isinstance(target, GpuTarget) else None


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    with function("row_starts") as done:
        rows, q_indptr, _, starts = cpu.operands(symbols, call)
        count, sequences = (symbols.dim(spec.shape[0]) for spec in (call.args[0], call.result))
        flat(target, sequences, lambda s: cpu.start(rows, count, q_indptr, starts, s, registers(1, "int32")))
    return done()


reference, roofline = cpu.reference, cpu.roofline
