"""Activations of float32 scalars from operations that every GPU language has: exp, division, square root."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from tvm import tirx

from llmc.schedules.cpu.emit import bind, f32

Expr = Any

_ERF_P = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def tanh(x: Expr) -> Expr:
    """1 - 2 / (exp(2x) + 1), which is ±1 where exp overflows or vanishes."""
    return f32(1.0) - f32(2.0) / (tirx.exp(f32(2.0) * x) + f32(1.0))


def erf(x: Expr) -> Expr:
    """Within 1.5e-7 (Abramowitz & Stegun, "Handbook of Mathematical Functions", 7.1.26)."""
    size = bind(tirx.max(x, -x))
    t = bind(f32(1.0) / (f32(1.0) + f32(_ERF_P) * size))
    series = f32(_ERF[-1])
    for coefficient in reversed(_ERF[:-1]):
        series = series * t + f32(coefficient)
    value = bind(f32(1.0) - series * t * tirx.exp(-size * size))
    return tirx.Select(x < f32(0.0), -value, value)


def _silu(x: Expr) -> Expr:
    return x / (f32(1.0) + tirx.exp(-x))


def _relu(x: Expr) -> Expr:
    return tirx.max(x, f32(0.0))


def _gelu(x: Expr) -> Expr:
    return f32(0.5) * x * (f32(1.0) + erf(bind(x * f32(1 / sqrt(2)))))


def _gelu_tanh(x: Expr) -> Expr:
    """Hendrycks & Gimpel, 2016, "Gaussian Error Linear Units": the approximation by tanh."""
    return f32(0.5) * x * (f32(1.0) + tanh(f32(sqrt(2 / pi)) * (x + f32(0.044715) * x * x * x)))


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
