"""What every CUDA family of ``llmc.linear`` shares with the portable ones: sample calls, operands, the reference, the roofline."""

from __future__ import annotations

from typing import Any

from llmc.schedules.gpu.linear_call import OP, activation, make_call, operand_names, reference, roofline
from llmc.schedules.protocol import KernelCall

__all__ = ["OP", "activation", "operand_names", "reference", "roofline", "sample"]


def sample(
    o: int, k: int, dtype: str = "bfloat16", out: str = "", bias_dtype: str = "", phase: str = "extend", **attrs: Any
) -> KernelCall:
    """A call with ``n`` rows, for a family's ``SHAPES``; ``attrs`` are those of the op that are not its defaults."""
    return make_call(o, k, dtype, phase=phase, out=out, bias_dtype=bias_dtype, **attrs)
