"""Reading weights of :mod:`.layout_plain`: vectors of codes to float32 values, scale and offset applied."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from llmc.passes.quantize.scheme import Scheme
from llmc.schedules.cpu.emit import Simd, bind, read, vector, words
from llmc.schedules.cpu.layout_plain import BLOCK, halved

Expr = Any


class Weight:
    """The rows of a plain matrix [o, k]. ``buffers``: by the names of the layout's parts."""

    def __init__(self, simd: Simd, scheme: Scheme, buffers: dict[str, Expr], k: int) -> None:
        self.simd, self.scheme, self.buffers = simd, scheme, buffers
        self.group = scheme.group or k

    def scales(self, row: Expr, group: Expr) -> tuple[Expr, Expr, Expr]:
        """Scale, zero point and minimum of a group, float32; None for what the scheme lacks."""
        simd, at = self.simd, self.buffers
        scale = bind(simd.load(at["scales"], row, group))
        zero = bind(tirx.Cast("float32", read(at["zeros"], row, group))) if "zeros" in at else None
        return scale, zero, bind(simd.load(at["minima"], row, group)) if "minima" in at else None

    def load(self, row: Expr, column: Expr, lanes: int, scales: tuple[Expr, Expr, Expr]) -> Expr:
        """``lanes`` weights of one group from ``column`` on, a multiple of ``lanes``; at most 16."""
        simd, (scale, zero, minimum) = self.simd, scales
        value = self._value(self._codes(row, column, lanes), lanes)
        if zero is not None:
            value = value - simd.splat(zero, lanes)
        value = value * simd.splat(scale, lanes)
        return bind(value if minimum is None else value + simd.splat(minimum, lanes))

    def _codes(self, row: Expr, column: Expr, lanes: int) -> Expr:
        """uint8, one code each."""
        if not halved(self.scheme):
            return read(self.buffers["codes"], row, column, lanes=lanes)
        half = BLOCK // 2
        at = tirx.floordiv(column, BLOCK) * half + tirx.floormod(column, half)
        shift = tirx.Cast("uint8", tirx.floormod(tirx.floordiv(column, half), 2) * 4)
        pairs = read(self.buffers["codes"], row, at, lanes=lanes)
        return (pairs >> self.simd.splat(shift, lanes)) & self.simd.splat(tirx.const(15, "uint8"), lanes)

    def _value(self, codes: Expr, lanes: int) -> Expr:
        floats, kind = vector("float32", lanes), self.scheme.kind
        if kind == "table":
            return self.buffers["table"][tirx.Cast(vector("int32", lanes), codes)]
        if kind == "int":
            middle = 1 << (self.scheme.bits - 1) if self.scheme.offset == "none" else 0
            value = tirx.Cast(floats, tirx.Cast(vector("int32", lanes), codes))
            return value - self.simd.splat(float(middle), lanes) if middle else value
        # Exponent and mantissa shifted to their place in a float32; the product corrects the exponent's bias, subnormals too.
        exponent, mantissa, bias = (4, 3, 7) if kind == "fp8_e4m3" else (2, 1, 1)
        wide = bind(tirx.Cast(vector("uint32", lanes), codes))
        bits = exponent + mantissa
        magnitude = (wide & words((1 << bits) - 1, lanes)) << words(23 - mantissa, lanes)
        sign = (wide >> words(bits, lanes)) << words(31, lanes)
        scale = tirx.reinterpret(floats, words((127 + 127 - bias) << 23, lanes))
        return tirx.reinterpret(floats, magnitude | sign) * scale
