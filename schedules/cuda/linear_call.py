"""What every CUDA family of ``llmc.linear`` shares: sample calls, the names of a call's operands, its reference, its roofline."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.dialect import linear as dialect
from llmc.dialect.linear import GATED, OP, is_gated
from llmc.schedules.cuda.emit import WIDTH
from llmc.schedules.protocol import KernelCall, TensorSpec


def sample(
    o: int, k: int, dtype: str = "bfloat16", out: str = "", bias_dtype: str = "", phase: str = "extend", **attrs: Any
) -> KernelCall:
    """A call with ``n`` rows, for a family's ``SHAPES``; ``attrs`` are those of the op that are not its defaults."""
    full = {"activation": "none", "bias": 0, "residual": 0, **attrs}
    results = o // 2 if is_gated(full["activation"]) else o
    args = [TensorSpec(("n", k), dtype), TensorSpec((o, k), dtype)]
    if full["bias"]:
        args.append(TensorSpec((o,), bias_dtype or dtype))
    if full["residual"]:
        args.append(TensorSpec(("n", results), dtype))
    return KernelCall(OP, tuple(args), TensorSpec(("n", results), out or dtype), tuple(sorted(full.items())), phase)


def activation(call: KernelCall) -> tuple[str, bool]:
    """The function that is applied, and whether it is applied to a gate."""
    name = str(call.attr("activation"))
    return name.removesuffix(GATED), is_gated(name)


def operand_names(call: KernelCall) -> list[str]:
    """The kernel's arguments in order; bias and residual only where the call has them."""
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", "weight", *optional, "out"]


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    """The result in float64 NumPy."""
    named: dict[str, Any] = dict(zip(operand_names(call), arrays, strict=False))
    return dialect.reference(**named, activation=call.attr("activation"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every operand and the result moved once; a multiply and an add per weight and row."""
    moved = sum(int(np.prod(s.bind(symbols))) * WIDTH[s.dtype] for s in (*call.args, call.result))
    n, k = call.args[0].bind(symbols)
    return moved, 2 * n * k * int(call.args[1].shape[0])
