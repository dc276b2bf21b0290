"""What every portable family of ``llmc.linear`` shares: operands, the end of a result, the reference, the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.dialect.linear import GATED, is_gated
from llmc.schedules.gpu.emit import WIDTH, Symbols, arguments, bind, common_lanes, function, load, storable, store_all
from llmc.schedules.gpu.math import ACTIVATIONS, activate
from llmc.schedules.gpu.operand import Floats, Operand
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
Emit = Callable[[KernelCall, GpuTarget, dict[str, Expr], Operand, int, Expr, dict[str, Any]], None]
"""``emit(call, target, buffers, weight, k, n, config)``: a template of a product; ``weight`` reads the matrix [o, k], ``buffers``
has x and what :func:`finish` wants."""

OP = "llmc.linear"


def make_call(
    o: int,
    k: int,
    dtype: str = "float32",
    weight: str = "",
    phase: str = "extend",
    out: str = "",
    bias_dtype: str = "",
    **attrs: Any,
) -> KernelCall:
    """A call for ``SHAPES``: x [n, k], weight [o, k], and bias and residual where the attributes ask for them; ``attrs`` are those
    of the op that are not its defaults."""
    full = {"activation": "none", "bias": 0, "residual": 0, **attrs}
    count = o // 2 if is_gated(full["activation"]) else o
    args = [TensorSpec(("n", k), dtype), TensorSpec((o, k), weight or dtype)]
    if full["bias"]:
        args.append(TensorSpec((o,), bias_dtype or weight or dtype))
    if full["residual"]:
        args.append(TensorSpec(("n", count), dtype))
    return KernelCall(OP, tuple(args), TensorSpec(("n", count), out or dtype), tuple(sorted(full.items())), phase)


def takes(call: KernelCall, target: Target) -> bool:
    """Whether a call is one that the portable kernels compute at all."""
    if call.op != OP or not storable(call, target) or activation(call)[0] not in ACTIVATIONS:
        return False
    return len(call.args[0].shape) == 2 and all(isinstance(d, int) for d in call.args[1].shape)


def activation(call: KernelCall) -> tuple[str, bool]:
    """The function that is applied, and whether it is applied to a gate."""
    name = str(call.attr("activation"))
    return name.removesuffix(GATED), is_gated(name)


def operand_names(call: KernelCall) -> list[str]:
    """The kernel's arguments in order; bias and residual only where the call has them."""
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", "weight", *optional, "out"]


def specs(call: KernelCall) -> dict[str, TensorSpec]:
    """Operands and result by name."""
    return dict(zip(operand_names(call), (*call.args, call.result), strict=True))


def build(name: str, emit: Emit, call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    """The kernel ``name`` of a template that takes any operand, over a matrix of floats."""
    symbols, (o, k) = Symbols(), (int(d) for d in call.args[1].shape)
    named = specs(call)
    with function(f"{name}_{o}x{k}") as done:
        buffers = dict(zip(named, arguments(symbols, **named), strict=True))
        weight = Floats(target, buffers["weight"], k, padded=False)
        emit(call, target, buffers, weight, k, symbols.dim(call.args[0].shape[0]), config)
    return done()


def finish(
    call: KernelCall, buffers: dict[str, Expr], totals: Sequence[Expr], row: Expr, output: Expr, factors: Sequence[Expr] = ()
) -> None:
    """Bias, activation, a gate's factors and residual of neighbouring results, and their store; ``output`` is a multiple of their
    number."""
    lanes, results = len(totals), int(call.result.shape[1])

    def biased(values: Sequence[Expr], first: Expr) -> list[Expr]:
        if not call.attr("bias"):
            return list(values)
        return [v + b for v, b in zip(values, load(buffers["bias"], first, lanes=lanes), strict=True)]

    values = [activate(activation(call)[0], bind(v)) for v in biased(totals, output)]
    if factors:
        values = [v * f for v, f in zip(values, biased(factors, output + results), strict=True)]
    if call.attr("residual"):
        values = [v + r for v, r in zip(values, load(buffers["residual"], row, output, lanes=lanes), strict=True)]
    store_all(buffers["out"], values, row, output)


def result_lanes(call: KernelCall, target: GpuTarget, most: int) -> int:
    """How many neighbouring results :func:`finish` may be given: whole vectors of bias, residual and result. Bias and residual are
    the last operands of a call."""
    read = call.args[len(call.args) - int(call.attr("bias")) - int(call.attr("residual")) :]
    return common_lanes(target, [s.dtype for s in (*read, call.result)], most, int(call.result.shape[1]))


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
