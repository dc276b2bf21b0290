"""What every CUDA family of ``llmc.linear`` shares with the portable ones: sample calls, operands, the reference, the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmc.schedules.gpu.linear_call import OP, activation, make_call, operand_names, reference, roofline, specs
from llmc.schedules.protocol import KernelCall, TensorSpec

__all__ = ["OP", "activation", "operand_names", "reference", "roofline", "sample", "specs"]

OPTIONAL = ("zeros", "minima", "bias", "residual")
"""Operands that kernels are written with and that not every call has, a plain or a quantized one."""


class Types(NamedTuple):
    """Dtypes of a linear's operands; x's for a bias or a residual that it does not have."""

    x: str
    out: str
    bias: str
    residual: str


def types(named: Mapping[str, TensorSpec]) -> Types:
    """Of operands and result by name."""
    x = named["x"]
    return Types(x.dtype, named["out"].dtype, named.get("bias", x).dtype, named.get("residual", x).dtype)


def absent(named: Mapping[str, TensorSpec]) -> list[str]:
    """The parameters of a kernel that a call with these operands does not have."""
    return [name for name in OPTIONAL if name not in named]


def sample(
    o: int, k: int, dtype: str = "bfloat16", out: str = "", bias_dtype: str = "", phase: str = "extend", **attrs: Any
) -> KernelCall:
    """A call with ``n`` rows, for a family's ``SHAPES``; ``attrs`` are those of the op that are not its defaults."""
    return make_call(o, k, dtype, phase=phase, out=out, bias_dtype=bias_dtype, **attrs)
