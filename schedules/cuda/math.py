"""Activations of float32 scalars in CUDA kernels: CUDA's own functions, accurate to an ulp or two."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from tvm import tirx

Expr = Any


def _f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def _silu(x: Expr) -> Expr:
    return x / (_f32(1.0) + tirx.exp(-x))


def _relu(x: Expr) -> Expr:
    return tirx.max(x, _f32(0.0))


def _gelu(x: Expr) -> Expr:
    return _f32(0.5) * x * (_f32(1.0) + tirx.erf(x * _f32(1 / sqrt(2))))


def _gelu_tanh(x: Expr) -> Expr:
    """Hendrycks & Gimpel, 2016, "Gaussian Error Linear Units": the approximation by tanh."""
    return _f32(0.5) * x * (_f32(1.0) + tirx.tanh(_f32(sqrt(2 / pi)) * (x + _f32(0.044715) * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "none": lambda x: x,
    "silu": _silu,
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""By the names of :data:`llmc.dialect.linear.ACTIVATIONS`."""


def activate(name: str, x: Expr) -> Expr:
    """The activation ``name`` of a float32 value; ``x`` is read more than once and should be bound."""
    return ACTIVATIONS[name](x)
