"""Matrices in the layout ``cuda.mma``, read eight columns of a row at a time as float32, by portable code."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from llmc.passes.quantize.scheme import Scheme
from llmc.schedules.cuda.emit import bind, f32, i64, read
from llmc.schedules.cuda.layout_mma import BLOCK, BYTE_PLACES, ROWS, UNIT, geometry

Expr = Any
UNITS = BLOCK // UNIT
"""In a block."""


class Units:
    """The matrix [o, k] of scheme ``how`` whose parts are ``buffers`` (by the names of :func:`.layout_mma.parts`)."""

    def __init__(self, how: Scheme, o: int, k: int, buffers: dict[str, Expr]) -> None:
        self.how, self.at, self.buffers = how, geometry(how, o, k), buffers

    def load(self, row: Expr, unit: Expr) -> list[Expr]:
        """Columns 8 unit .. 8 unit + 7 of ``row`` (both int64, inside the padded matrix): eight float32."""
        tile, inside = bind(tirx.floordiv(row, ROWS)), bind(tirx.floormod(row, ROWS))
        group, half = bind(tirx.floormod(inside, 8)), bind(tirx.floordiv(inside, 8))
        values = self._values(tile, bind(group * 4 + tirx.floormod(unit, 4)), half, bind(tirx.floordiv(unit, 4)))
        if not self.at.group:
            scale = _float(read(self.buffers["scales"], row))
            return [v * scale for v in self._centred(values, None)]
        where = (
            tile, bind(tirx.floordiv(unit, UNITS)), group,
            bind(tirx.floordiv(tirx.floormod(unit, UNITS), self.at.group // UNIT)), half,
        )  # fmt: skip
        scale = _float(read(self.buffers["scales"], *where))
        zero = _float(read(self.buffers["zeros"], *where)) if "zeros" in self.buffers else None
        values = [v * scale for v in self._centred(values, zero)]
        if "minima" not in self.buffers:
            return values
        minimum = _float(read(self.buffers["minima"], *where))
        return [v + minimum for v in values]

    def _values(self, tile: Expr, lane: Expr, half: Expr, piece: Expr) -> list[Expr]:
        """What the codes of a lane in ``piece`` (32 columns) stand for, before scale and offset."""
        codes, bits = self.buffers["codes"], self.at.bits
        if bits == 4:
            word = bind(read(codes, tile, tirx.floordiv(piece, 2), lane, tirx.floormod(piece, 2) * 2 + half))
            return [_float(_field(word, 4 * (e // 2 + 4 * (e % 2)), 15)) for e in range(UNIT)]
        words = [bind(read(codes, tile, piece, lane, half * 2 + p)) for p in range(2)]
        fields = [_field(words[e // 4], 8 * BYTE_PLACES[e % 4], 255) for e in range(UNIT)]
        return [_e4m3(f) if self.how.kind == "fp8_e4m3" else _float(f) for f in fields]

    def _centred(self, values: list[Expr], zero: Expr | None) -> list[Expr]:
        if self.how.kind == "int" and self.how.offset == "none":
            zero = f32(float(1 << (self.how.bits - 1)))
        return values if zero is None else [v - zero for v in values]


def _field(word: Expr, shift: int, mask: int) -> Expr:
    return bind(tirx.bitwise_and(tirx.shift_right(word, tirx.const(shift, "int32")), tirx.const(mask, "int32")))


def _float(value: Expr) -> Expr:
    return bind(value if str(value.ty.dtype) == "float32" else tirx.Cast("float32", value))


def _e4m3(code: Expr) -> Expr:
    """sign · 2^(e - 7) · (1 + m / 8), or sign · 2^-6 · m / 8 where e = 0: no subnormal float32 on the way, they may be flushed."""
    magnitude = bind(tirx.bitwise_and(code, tirx.const(0x7F, "int32")))
    normal = tirx.reinterpret("float32", bind((magnitude << 20) + tirx.const((127 - 7) << 23, "int32")))
    size = tirx.Select(magnitude < 8, _float(magnitude) * f32(2.0**-9), normal)
    return bind(tirx.Select(code < 128, size, -size))


def padded(row: Expr, last: int) -> Expr:
    """``row``, or the last one instead of one that is not there."""
    return bind(tirx.min(i64(row), last))
