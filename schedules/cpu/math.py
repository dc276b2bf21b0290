"""Elementary functions on float32 vectors, without libm: a call per lane would be slow, and differ from machine to machine.

Polynomials are fitted here, at Chebyshev nodes in float64, rather than quoted, so that each constant's origin is on the page.
Errors against float64, over the float32 range: exp 2 ulp; tanh 3e-7 relative; gelu 1e-6 · max(1, |x|).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import erfc
from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.cpu.emit import Simd, bind, keep, vector

Expr = Any
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286068203094172e-06  # ln 2, the first part exact times any exponent
ROUND = 12582912.0  # 1.5 · 2^23: adding it leaves the nearest integer in the low mantissa bits (Cody & Waite, 1980)


def _fit(f: Callable[[np.ndarray], np.ndarray], low: float, high: float, degree: int) -> list[float]:
    """Power-basis coefficients, lowest first, of the Chebyshev interpolant of ``f`` on [low, high]."""
    series = np.polynomial.Chebyshev.interpolate(f, degree, domain=[low, high])
    return [float(c) for c in series.convert(kind=np.polynomial.Polynomial).coef]


@cache
def exp_coefficients() -> list[float]:
    """exp(r) = 1 + r + r² P(r) for |r| ≤ ln 2 / 2."""

    def rest(r: np.ndarray) -> np.ndarray:
        return np.where(np.abs(r) < 1e-3, 0.5 + r / 6 + r * r / 24, (np.expm1(r) - r) / np.where(r == 0, 1, r * r))

    return _fit(rest, -0.35, 0.35, 5)


@cache
def _tanh_coefficients() -> list[float]:
    """tanh(x) = x P(x²) for |x| ≤ 0.625."""
    return _fit(
        lambda z: np.where(z < 1e-8, 1 - z / 3, np.tanh(np.sqrt(np.maximum(z, 1e-8))) / np.sqrt(np.maximum(z, 1e-8))), 0, 0.4, 6
    )


@cache
def _erfc_coefficients() -> list[float]:
    """erfc(z) = exp(-z²) P(t) with t = 1 / (1 + 0.4 z) for z in [0, 9] (the form of Abramowitz & Stegun 7.1.26)."""

    def scaled(t: np.ndarray) -> np.ndarray:
        z = (1 / t - 1) / 0.4
        return np.array([erfc(v) * np.exp(v * v) for v in np.atleast_1d(z)])

    return _fit(scaled, 1 / (1 + 0.4 * 9), 1.0, 11)


class Math:
    """The functions, on vectors of ``lanes`` float32 values."""

    def __init__(self, simd: Simd, lanes: int) -> None:
        self.simd, self.lanes = simd, lanes

    def _c(self, value: float) -> Expr:
        return self.simd.splat(value, self.lanes)

    def _polynomial(self, x: Expr, coefficients: Sequence[float]) -> Expr:
        """Horner's rule, coefficients lowest first."""
        value = self._c(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value = self.simd.fma(value, x, self._c(c))
        return value

    def exp(self, x: Expr) -> Expr:
        """exp(x); x is clamped to [-87, 88.7], so the result is finite and never zero."""
        fma, integers = self.simd.fma, vector("int32", self.lanes)
        x = keep(tirx.max(tirx.min(x, self._c(88.7)), self._c(-87.0)))
        # Seen through its bits the rounded sum is opaque to TVM, which would cancel (a + ROUND) - ROUND.
        bits = bind(tirx.reinterpret(integers, fma(x, self._c(LOG2_E), self._c(ROUND))))
        n = bind(tirx.reinterpret(vector("float32", self.lanes), bits) - self._c(ROUND))
        r = keep(fma(n, self._c(-LN2_LOW), fma(n, self._c(-LN2_HIGH), x)))
        p = fma(self._polynomial(r, exp_coefficients()), r * r, r) + self._c(1.0)
        shift = tirx.const(23, "int32")
        exponent = bits << (shift if self.lanes == 1 else tirx.Broadcast(shift, self.lanes))
        return keep(tirx.reinterpret(vector("float32", self.lanes), tirx.reinterpret(integers, p) + exponent))

    def sigmoid(self, x: Expr) -> Expr:
        return self._c(1.0) / (self._c(1.0) + self.exp(self._c(0.0) - x))

    def tanh(self, x: Expr) -> Expr:
        x = bind(x)
        small = x * self._polynomial(bind(x * x), _tanh_coefficients())
        size = bind(tirx.max(x, self._c(0.0) - x))
        far = bind(self._c(1.0) - self._c(2.0) / (self.exp(size + size) + self._c(1.0)))
        large = tirx.Select(x < self._c(0.0), self._c(0.0) - far, far)
        return bind(tirx.Select(size < self._c(0.625), small, large))

    def erf(self, x: Expr) -> Expr:
        x = bind(x)
        tail = bind(self._erfc(bind(tirx.max(x, self._c(0.0) - x))))
        return bind(tirx.Select(x < self._c(0.0), tail - self._c(1.0), self._c(1.0) - tail))

    def _erfc(self, z: Expr) -> Expr:
        """erfc(z) for z ≥ 0."""
        z = bind(tirx.min(z, self._c(9.0)))
        t = bind(self._c(1.0) / self.simd.fma(z, self._c(0.4), self._c(1.0)))
        return self.exp(self._c(0.0) - z * z) * self._polynomial(t, _erfc_coefficients())

    def gelu(self, x: Expr) -> Expr:
        """x Φ(x), with the tail of Φ computed directly so that large negative x keeps its relative precision."""
        x = bind(x)
        tail = bind(self._erfc(bind(tirx.max(x, self._c(0.0) - x) * self._c(0.7071067811865476))) * self._c(0.5))
        return bind(x * tirx.Select(x < self._c(0.0), tail, self._c(1.0) - tail))

    def gelu_tanh(self, x: Expr) -> Expr:
        """x / 2 (1 + tanh u) = x sigmoid(2u), u = √(2/π) (x + 0.044715 x³)."""
        x = bind(x)
        u = x * self.simd.fma(bind(x * x), self._c(2 * 0.7978845608028654 * 0.044715), self._c(2 * 0.7978845608028654))
        return bind(x * self.sigmoid(u))

    def activate(self, name: str, x: Expr) -> Expr:
        """One of ``llmc.dialect.linear.ACTIVATIONS``."""
        zero = self._c(0.0)
        if name == "none":
            return x
        if name == "relu":
            return bind(tirx.max(x, zero))
        x = bind(x)
        if name == "relu2":
            return bind(tirx.max(x, zero) * tirx.max(x, zero))
        if name == "silu":
            return bind(x * self.sigmoid(x))
        return {"gelu": self.gelu, "gelu_tanh": self.gelu_tanh}[name](x)


ACTIVATIONS = ("none", "relu", "relu2", "silu", "gelu", "gelu_tanh")
