"""What every portable family of ``llmc.linear`` shares: operands, the end of a result, the reference, the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.schedules.gpu.emit import WIDTH, bind, load, storable, store_all
from llmc.schedules.gpu.math import ACTIVATIONS, activate
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
OP = "llmc.linear"


def make_call(
    o: int, k: int, dtype: str = "float32", weight: str = "", phase: str = "extend", out: str = "", **attrs: Any
) -> KernelCall:
    """A call for ``SHAPES``: x [n, k], weight [o, k], and bias and residual where the attributes ask for them."""
    args = [TensorSpec(("n", k), dtype), TensorSpec((o, k), weight or dtype)]
    if attrs.get("bias"):
        args.append(TensorSpec((o,), weight or dtype))
    if attrs.get("residual"):
        args.append(TensorSpec(("n", o), dtype))
    full = {"activation": "none", "bias": 0, "residual": 0, **attrs}
    return KernelCall(OP, tuple(args), TensorSpec(("n", o), out or dtype), tuple(sorted(full.items())), phase)


def takes(call: KernelCall, target: Target) -> bool:
    """Whether a call is one that the portable kernels compute at all."""
    if call.op != OP or not storable(call, target) or call.attr("activation") not in ACTIVATIONS:
        return False
    return len(call.args[0].shape) == 2 and all(isinstance(d, int) for d in call.args[1].shape)


def operand_names(call: KernelCall) -> list[str]:
    """The kernel's arguments in order; bias and residual only where the call has them."""
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", "weight", *optional, "out"]


def finish(call: KernelCall, buffers: dict[str, Expr], totals: Sequence[Expr], row: Expr, output: Expr) -> None:
    """Bias, activation and residual of neighbouring results, and their store; ``output`` is a multiple of their number."""
    lanes = len(totals)
    values = list(totals)
    if call.attr("bias"):
        values = [v + b for v, b in zip(values, load(buffers["bias"], output, lanes=lanes), strict=True)]
    values = [activate(call.attr("activation"), bind(v)) for v in values]
    if call.attr("residual"):
        values = [v + r for v, r in zip(values, load(buffers["residual"], row, output, lanes=lanes), strict=True)]
    store_all(buffers["out"], values, row, output)


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
