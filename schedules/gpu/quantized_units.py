"""Matrices in the layout ``gpu.mma``, read eight columns of a row at a time as float32, by portable code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm import tirx

from llmc.passes.quantize.scheme import Scheme
from llmc.schedules.gpu.emit import bind, f32, read, registers, store
from llmc.schedules.gpu.layout_mma import BLOCK, BYTE_PLACES, ROWS, UNIT, geometry

Expr = Any
Part = tuple[list[Expr], Expr | None, Expr | None]
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
        where = self._where(tile, group, half, unit)
        scale = _float(read(self.buffers["scales"], *where))
        zero = _float(read(self.buffers["zeros"], *where)) if "zeros" in self.buffers else None
        values = [v * scale for v in self._centred(values, zero)]
        if "minima" not in self.buffers:
            return values
        minimum = _float(read(self.buffers["minima"], *where))
        return [v + minimum for v in values]

    @property
    def shifted(self) -> bool:
        """Whether values are not multiples of their scales: codes off by a constant, a zero point, or a minimum."""
        return self.how.kind == "int"

    def lane_units(self, tiles: list[Expr], chunk: Expr, lane: Expr) -> Iterator[tuple[Expr, list[list[Part]]]]:
        """What lane 4 g + t has of a chunk of each tile, by one load of 16 bytes a tile.

        For each unit of eight columns its index, and for each tile and its rows g and g + 8 eight codes as float32, scale and
        shift: a value is scale · code + shift. A scale of None is left to :meth:`row_scale`, a shift of None is 0.
        """
        loads = [registers(4, "int32") for _ in tiles]
        for held, tile in zip(loads, tiles, strict=True):
            store(held, read(self.buffers["codes"], tile, chunk, lane, 0, lanes=4), 0, lanes=4)
        group, member = bind(tirx.floordiv(lane, 4)), bind(tirx.floormod(lane, 4))
        in_chunk = self.at.chunk // UNIT
        for part in range(in_chunk // 4):
            unit = bind(chunk * in_chunk + part * 4 + member)
            rows: list[list[Part]] = []
            for held, tile in zip(loads, tiles, strict=True):
                rows.append([])
                for half in range(2):
                    words = [part * 2 + half] if self.at.bits == 4 else [half * 2, half * 2 + 1]
                    codes = self._codes([bind(held[word]) for word in words])
                    rows[-1].append((codes, *self._scale(tile, group, half, unit)))
            yield unit, rows

    def row_scale(self, row: Expr) -> Expr:
        """What the sums of a row are multiplied by at the end."""
        return f32(1.0) if self.at.group else _float(read(self.buffers["scales"], row))

    def _scale(self, tile: Expr, group: Expr, half: int, unit: Expr) -> tuple[Expr | None, Expr | None]:
        middle = f32(-float(1 << (self.how.bits - 1))) if self.how.kind == "int" and self.how.offset == "none" else None
        if not self.at.group:
            return None, middle
        where = self._where(tile, group, half, unit)
        scale = _float(read(self.buffers["scales"], *where))
        if "minima" in self.buffers:
            return scale, _float(read(self.buffers["minima"], *where))
        if "zeros" in self.buffers:
            return scale, bind(-(scale * _float(read(self.buffers["zeros"], *where))))
        return scale, None if middle is None else bind(scale * middle)

    def _where(self, tile: Expr, group: Expr, half: Expr, unit: Expr) -> tuple[Expr, ...]:
        """The index of a unit's group in scales, zeros and minima."""
        inside = bind(tirx.floordiv(tirx.floormod(unit, UNITS), self.at.group // UNIT))
        return tile, bind(tirx.floordiv(unit, UNITS)), group, inside, half

    def _values(self, tile: Expr, lane: Expr, half: Expr, piece: Expr) -> list[Expr]:
        """What the codes of a lane in ``piece`` (32 columns) stand for, before scale and offset."""
        codes = self.buffers["codes"]
        if self.at.bits == 4:
            return self._codes([bind(read(codes, tile, tirx.floordiv(piece, 2), lane, tirx.floormod(piece, 2) * 2 + half))])
        return self._codes([bind(read(codes, tile, piece, lane, half * 2 + p)) for p in range(2)])

    def _codes(self, words: list[Expr]) -> list[Expr]:
        """The eight codes of a row in one word of a lane, or in two, as float32."""
        if self.at.bits == 4:
            return [_float(_field(words[0], 4 * (e // 2 + 4 * (e % 2)), 15)) for e in range(UNIT)]
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
