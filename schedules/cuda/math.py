"""Activations of float32 scalars in CUDA kernels: the portable ones, with CUDA's own erf and tanh, accurate to an ulp or two."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from tvm import tirx

from llmc.schedules.gpu import math as portable
from llmc.schedules.gpu.emit import f32

Expr = Any


def _gelu(x: Expr) -> Expr:
    return f32(0.5) * x * (f32(1.0) + tirx.erf(x * f32(1 / sqrt(2))))


def _gelu_tanh(x: Expr) -> Expr:
    """Hendrycks & Gimpel, 2016, "Gaussian Error Linear Units": the approximation by tanh."""
    return f32(0.5) * x * (f32(1.0) + tirx.tanh(f32(sqrt(2 / pi)) * (x + f32(0.044715) * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {**portable.ACTIVATIONS, "gelu": _gelu, "gelu_tanh": _gelu_tanh}
"""By the names of :data:`llmc.dialect.linear.ACTIVATIONS`."""


def activate(name: str, x: Expr) -> Expr:
    """The activation ``name`` of a float32 value; ``x`` is read more than once and should be bound."""
    return ACTIVATIONS[name](x)
