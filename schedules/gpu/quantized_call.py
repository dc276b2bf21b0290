"""What every family of ``llmc.quantized_linear`` shares: a call's operands by name, its reference, its roofline."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.dialect.linear import is_gated
from llmc.dialect.linear import reference as linear_reference
from llmc.passes.quantize.scheme import Scheme, scheme
from llmc.schedules.gpu import layout_mma, linear_call
from llmc.schedules.gpu.emit import STORAGE, Symbols, arguments, function
from llmc.schedules.gpu.math import ACTIVATIONS
from llmc.schedules.gpu.operand import Codes
from llmc.schedules.gpu.quantized_units import Units
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget

OP = "llmc.quantized_linear"
BYTES = {"int32": 4, "uint8": 1, "float32": 4, "float16": 2, "bfloat16": 2}


def make(
    o: int, k: int, name: str, dtype: str = "bfloat16", phase: str = "decode", out: str = "", bias_dtype: str = "", **attrs: Any
) -> KernelCall:
    """A call for a family's ``SHAPES``."""
    full = {"activation": "none", "bias": 0, "residual": 0, "scheme": name, "layout": layout_mma.NAME, "o": o, "k": k, **attrs}
    results = o // 2 if is_gated(full["activation"]) else o
    args = [TensorSpec(("n", k), dtype), *layout_mma.parts(scheme(name), o, k).values()]
    if full["bias"]:
        args.append(TensorSpec((o,), bias_dtype or dtype))
    if full["residual"]:
        args.append(TensorSpec(("n", results), dtype))
    return KernelCall(OP, tuple(args), TensorSpec(("n", results), out or dtype), tuple(sorted(full.items())), phase)


def operand_names(call: KernelCall) -> list[str]:
    """The kernel's arguments in order; parts, bias and residual only where the call has them."""
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", *part_names(call), *optional, "out"]


def part_names(call: KernelCall) -> list[str]:
    return list(layout_mma.parts(how(call), call.attr("o"), call.attr("k")))


def how(call: KernelCall) -> Scheme:
    return scheme(call.attr("scheme"))


def specs(call: KernelCall) -> dict[str, TensorSpec]:
    """Operands and result by name."""
    return dict(zip(operand_names(call), (*call.args, call.result), strict=True))


def build(name: str, emit: linear_call.Emit, call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    """The kernel ``name`` of a template that takes any operand, over codes."""
    symbols, scheme_of, o, k = Symbols(), how(call), int(call.attr("o")), int(call.attr("k"))
    named = specs(call)
    with function(f"{name}_{scheme_of.name}_{o}x{k}") as done:
        buffers = dict(zip(named, arguments(symbols, **named), strict=True))
        units = Units(scheme_of, o, k, {part: buffers[part] for part in part_names(call)})
        weight = Codes(target, units, k, call.args[0].dtype)
        emit(call, target, buffers, weight, k, symbols.dim(call.args[0].shape[0]), config)
    return done()


def is_ours(call: KernelCall, target: Any) -> bool:
    """Whether this is a linear over a matrix in the layout ``gpu.mma`` on a GPU, with float activations."""
    return (
        call.op == OP
        and isinstance(target, GpuTarget)
        and call.attr("layout") == layout_mma.NAME
        and call.attr("activations", "compute") == "compute"
        and len(call.args[0].shape) == 2
    )


def takes(call: KernelCall, target: Any) -> bool:
    """Whether it is one that the portable kernels compute: activations, bias and results in dtypes that they load."""
    if not is_ours(call, target) or linear_call.activation(call)[0] not in ACTIVATIONS:
        return False
    parts = part_names(call)
    return all(s.dtype in STORAGE for name, s in specs(call).items() if name not in parts)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    """The linear over the dequantized matrix, in float64 NumPy."""
    named: dict[str, Any] = dict(zip(operand_names(call), arrays, strict=False))
    parts = {name: named.pop(name) for name in part_names(call)}
    weight = layout_mma.unpack(parts, how(call), call.attr("o"), call.attr("k")).dequantize()
    return linear_reference(named.pop("x"), weight, activation=call.attr("activation"), **named)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every operand and the result moved once; a multiply and an add per weight and row."""
    moved = sum(int(np.prod(s.bind(symbols))) * BYTES[s.dtype] for s in (*call.args, call.result))
    n, k = call.args[0].bind(symbols)
    return moved, 2 * n * k * int(call.attr("o"))
