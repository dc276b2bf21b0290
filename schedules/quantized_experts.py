"""What every family of ``llmc.quantized_moe`` shares: sample calls, a call's operands by name, its reference, its roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.dialect.quantized_moe import OP, STACKS, shape_of
from llmc.passes.quantize.scheme import Scheme, scheme
from llmc.schedules.layouts import WeightLayout, stack_parts, unpack_stack
from llmc.schedules.protocol import KernelCall, TensorSpec

Expr = Any
Layouts = Sequence[WeightLayout]
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Of:
    """A stack of tensors as one of them: the buffer with its first index given."""

    buffer: Expr
    first: Expr

    @property
    def ty(self) -> Any:
        return self.buffer.ty

    def __getitem__(self, index: Any) -> Expr:
        return self.buffer[(self.first, *(index if isinstance(index, tuple) else (index,)))]


def sample(
    h: int, i: int, experts: int, top_k: int, up: str, down: str, layout_for: Callable[[Scheme], WeightLayout], dtype: str,
    phase: str = "extend", activations: str = "compute", **attrs: Any,
) -> KernelCall:  # fmt: skip
    """A call for a family's ``SHAPES``: experts h -> i -> h with the schemes ``up`` and ``down``."""
    full = {
        "top_k": top_k, "activation": "silu", "gated": 1, "interleave": 0, "bias": 0, "alpha": 1.0, "limit": 0.0, "offset": 0.0,
        "experts": experts, "hidden": h, "inner": i, "activations": activations, "gate_up_scheme": up, "down_scheme": down, **attrs,
    }  # fmt: skip
    x = TensorSpec(("n", h), dtype)
    args = [x, TensorSpec(("n", top_k), "int32"), TensorSpec(("n", top_k), dtype)]
    for stack in STACKS:
        how, (o, k) = scheme(full[f"{stack}_scheme"]), shape_of(full, stack)
        layout = layout_for(how)
        full[f"{stack}_layout"] = layout.NAME
        args += stack_parts(layout, how, experts, o, k).values()
    if full["bias"]:
        args += [TensorSpec((experts, shape_of(full, stack)[0]), dtype) for stack in STACKS]
    return KernelCall(OP, tuple(args), x, tuple(sorted(full.items())), phase)


def shape(call: KernelCall, stack: str) -> tuple[int, int]:
    """[o, k] of one expert's matrix."""
    return shape_of(dict(call.attrs), stack)


def how(call: KernelCall, stack: str) -> Scheme:
    return scheme(call.attr(f"{stack}_scheme"))


def layout_of(call: KernelCall, stack: str, layouts: Layouts) -> WeightLayout | None:
    """The one of ``layouts`` that a stack is stored in, or None."""
    return next((layout for layout in layouts if call.attr(f"{stack}_layout") == layout.NAME), None)


def part_names(call: KernelCall, stack: str, layouts: Layouts) -> list[str]:
    layout = layout_of(call, stack, layouts)
    assert layout is not None
    return list(layout.parts(how(call, stack), *shape(call, stack)))


def operand_names(call: KernelCall, layouts: Layouts) -> list[str]:
    """The kernel's arguments in order: a part is ``"gate_up.codes"``; biases only where the call has them."""
    parts = [f"{stack}.{name}" for stack in STACKS for name in part_names(call, stack, layouts)]
    return ["x", "ids", "weights", *parts, *(f"{stack}_bias" for stack in STACKS if call.attr("bias")), "out"]


def reference(call: KernelCall, layouts: Layouts, *arrays: np.ndarray) -> np.ndarray:
    """The experts of the dequantized matrices, in float64 NumPy."""
    from llmc.dialect.moe import reference as moe_reference

    named = dict(zip(operand_names(call, layouts), arrays, strict=False))
    dense = []
    for stack in STACKS:
        layout, (o, k) = layout_of(call, stack, layouts), shape(call, stack)
        assert layout is not None
        parts = {name: named[f"{stack}.{name}"] for name in part_names(call, stack, layouts)}
        dense.append(unpack_stack(layout, parts, how(call, stack), o, k).dequantize().reshape(call.attr("experts"), o, k))
    attrs = {name: call.attr(name) for name in ("activation", "gated", "interleave", "alpha", "limit", "offset")}
    biases = [named[f"{stack}_bias"] for stack in STACKS if call.attr("bias")]
    return moe_reference(named["x"], named["ids"], named["weights"], *dense, *biases, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every expert that the step can route to is read once, and x and the result moved once."""
    n, top_k = call.args[1].bind(symbols)
    sizes = {stack: shape(call, stack) for stack in STACKS}
    bits = sum(o * k * how(call, stack).bits_per_weight(k) for stack, (o, k) in sizes.items())
    weights = sum(o * k for o, k in sizes.values())
    moved = 2 * FLOAT_BYTES[call.args[0].dtype] * n * call.attr("hidden")
    return int(min(call.attr("experts"), n * top_k) * bits / 8) + moved, 2 * n * top_k * weights
