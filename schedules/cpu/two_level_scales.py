"""Kernels' side of :mod:`.two_level`: the float32 scales and minima of some rows of a panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from llmc.passes.quantize.scheme import Scheme
from llmc.schedules.cpu.emit import Simd, bind, shuffle, vector
from llmc.schedules.cpu.layout_panel import Panels
from llmc.schedules.cpu.two_level import ROWS, SUPER_BYTES, kinds, offset

Expr = Any


class TwoLevel:
    """``load(byte, lanes)``: uint8 of a panel laid out as ``at`` says."""

    def __init__(self, simd: Simd, scheme: Scheme, at: Panels, load: Callable[[Expr, int], Expr]) -> None:
        self.simd, self.scheme, self.at, self.load = simd, scheme, at, load

    def scale(self, record: Expr, s: int, row: Any, lanes: int) -> Expr:
        """The scales of group ``s`` of the record at byte ``record``, for ``lanes`` rows from ``row`` on: float32."""
        return self._product(record, s * kinds(self.scheme), 0, row, lanes)

    def minimum(self, record: Expr, s: int, row: Any, lanes: int) -> Expr:
        """The same for minima."""
        return self.simd.splat(0.0, lanes) - self._product(record, s * 2 + 1, 1, row, lanes)

    def _product(self, record: Expr, field: int, kind: int, row: Any, lanes: int) -> Expr:
        block = tirx.floordiv(record, (self.at.super_records * self.at.record_bytes)) * self.at.super_bytes
        raw = self.load(block + (self.at.supers_at + kind * SUPER_BYTES) + row * 2, 2 * lanes)
        factor = self.simd.widen(tirx.reinterpret(vector("float16", lanes), raw), "float16", lanes)
        integer = self._field(record + self.at.scales_at, field, row, lanes)
        if shift := offset(self.scheme):
            integer = integer - _splat(shift, "int32", lanes)
        return bind(factor * tirx.Cast(vector("float32", lanes), integer))

    def _field(self, at: Expr, field: int, row: Any, lanes: int) -> Expr:
        """int32, as stored."""
        wide = vector("int32", lanes)
        if self.scheme.sub_bits == 8:
            return tirx.Cast(wide, tirx.reinterpret(vector("int8", lanes), self.load(at + (field * ROWS) + row, lanes)))
        if self.scheme.sub_bits == 4:
            pair = self.load(at + (field // 2 * ROWS) + row, lanes)
            return tirx.Cast(wide, pair >> _splat(4, "uint8", lanes) if field % 2 else pair & _splat(15, "uint8", lanes))
        low = self.load(at + row, lanes)
        if field == 0:
            return tirx.Cast(wide, low & _splat(63, "uint8", lanes))
        high = self._high(at + ROWS, row, lanes)
        return tirx.Cast(wide, low >> _splat(6, "uint8", lanes) | high << _splat(2, "uint8", lanes))

    def _high(self, at: Expr, row: Any, lanes: int) -> Expr:
        """The half bytes of ``lanes`` rows from ``row`` on."""
        if lanes == ROWS:
            both = bind(self.load(at, 8))
            return shuffle([both & _splat(15, "uint8", 8), both >> _splat(4, "uint8", 8)], range(ROWS))
        if isinstance(row, int):
            some = self.load(at + row % 8, lanes)
            return some >> _splat(4, "uint8", lanes) if row >= 8 else some & _splat(15, "uint8", lanes)
        shift = tirx.Cast("uint8", tirx.floordiv(row, 8) * 4)
        return (self.load(at + tirx.floormod(row, 8), 1) >> shift) & _splat(15, "uint8", 1)


def _splat(value: int, dtype: str, lanes: int) -> Expr:
    constant = tirx.const(value, dtype)
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)
