"""What every CUDA family of ``llmc.linear`` shares: the names of a call's operands, its reference, its roofline."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.schedules.cuda.emit import WIDTH
from llmc.schedules.protocol import KernelCall


def operand_names(call: KernelCall) -> list[str]:
    """The kernel's arguments in order; bias and residual only where the call has them."""
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", "weight", *optional, "out"]


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    """The result in float64 NumPy."""
    from llmc.dialect.linear import reference as linear_reference

    named: dict[str, Any] = dict(zip(operand_names(call), arrays, strict=False))
    return linear_reference(**named, activation=call.attr("activation"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every operand and the result moved once; a multiply and an add per weight and row."""
    moved = sum(int(np.prod(s.bind(symbols))) * WIDTH[s.dtype] for s in (*call.args, call.result))
    n, k = call.args[0].bind(symbols)
    return moved, 2 * n * k * int(call.args[1].shape[0])
