"""Complex numbers, which some rotary embeddings are written in: kept as a pair of real tensors, and never seen by a pass.

``polar(1, θ)`` is (cos θ, sin θ); a product of pairs is (ac - bd, ad + bc); ``view_as_real`` interleaves the pair again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tvm import relax

from llmc.importer.aten.registry import converts
from llmc.importer.aten.shape import permuted, selected, stack
from llmc.importer.report import Refused
from llmc.importer.values import Size, Tensor
from llmc.importer.walker import Walker

R = relax.op


@dataclass(frozen=True)
class Complex:
    """A complex tensor: real and imaginary part, of one shape and dtype."""

    real: Tensor
    imag: Tensor

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.real.shape

    @property
    def ndim(self) -> int:
        return self.real.ndim


def times(w: Walker, a: Tensor, b: Tensor, shape: tuple[Size, ...]) -> Tensor:
    return w.tensor(R.multiply(a.expr, b.expr), shape, a.dtype)


@converts("aten.polar")
def polar(w: Walker, node: torch.fx.Node, magnitude: Tensor, angle: Tensor) -> Complex:
    shape = angle.shape
    cosine = w.tensor(R.cos(angle.expr), shape, angle.dtype)
    sine = w.tensor(R.sin(angle.expr), shape, angle.dtype)
    return Complex(times(w, magnitude, cosine, shape), times(w, magnitude, sine, shape))


@converts("aten.view_as_complex")
def view_as_complex(w: Walker, node: torch.fx.Node, a: Tensor) -> Complex:
    return Complex(selected(w, a, -1, 0), selected(w, a, -1, 1))


@converts("aten.view_as_real")
def view_as_real(w: Walker, node: torch.fx.Node, a: Complex) -> Tensor:
    return stack(w, node, [a.real, a.imag], -1)


def multiply(w: Walker, node: torch.fx.Node, a: Any, b: Any) -> Complex:
    """A product in which at least one factor is complex; the other may be a real tensor or a number."""
    shape = tuple(w.sizes(node))
    if not isinstance(a, Complex):
        a, b = b, a
    if isinstance(b, Complex):
        real = w.tensor(R.subtract(times(w, a.real, b.real, shape).expr, times(w, a.imag, b.imag, shape).expr), shape, a.real.dtype)
        imag = w.tensor(R.add(times(w, a.real, b.imag, shape).expr, times(w, a.imag, b.real, shape).expr), shape, a.real.dtype)
        return Complex(real, imag)
    if isinstance(b, bool | int | float):
        factor = Tensor(w.constant(float(b), a.real.dtype), (), a.real.dtype)
    elif isinstance(b, Tensor):
        factor = w.cast(b, a.real.dtype)
    else:
        raise Refused("a complex product with the number of tokens")
    return Complex(times(w, a.real, factor, shape), times(w, a.imag, factor, shape))


def rearranged(w: Walker, node: torch.fx.Node, name: str, a: Complex, args: list[Any]) -> Complex:
    """Ops that only move elements, on both parts."""
    shape = tuple(w.sizes(node))

    def move(part: Tensor) -> Tensor:
        if name == "aten.transpose":
            order = list(range(part.ndim))
            order[args[0]], order[args[1]] = order[args[1]], order[args[0]]
            return permuted(w, part, order)
        return w.reshape(part, shape)

    return Complex(move(a.real), move(a.imag))


KEEP_ORDER = frozenset({
    "aten.view", "aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.alias", "aten.clone", "aten.contiguous", "aten.to",
    "aten._to_copy", "aten.detach", "aten.flatten", "aten.transpose",
})  # fmt: skip


def convert(w: Walker, node: torch.fx.Node, name: str, args: list[Any]) -> Any:
    """An op of which an operand is complex. Raises Refused for one that has no meaning on pairs."""
    if name == "aten.mul":
        return multiply(w, node, *args[:2])
    if name in KEEP_ORDER:
        return rearranged(w, node, name, args[0], args[1:])
    if name == "aten.view_as_real":
        return view_as_real(w, node, args[0])
    raise Refused("this operator on complex numbers")
