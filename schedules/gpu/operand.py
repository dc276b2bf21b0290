"""The matrices of a product as a tile's threads read them: eight neighbouring columns of a line at a time.

One interface for matrices of floats and for quantized ones, so that a template of a product takes both.
"""

from __future__ import annotations

from typing import Any, Protocol

from tvm import tirx

from llmc.schedules.cpu.emit import vector
from llmc.schedules.gpu.emit import bind, common_lanes, f32, held_as, load, narrow, raw, read, registers, store, when
from llmc.schedules.gpu.layout_mma import UNIT
from llmc.schedules.gpu.quantized_units import Units
from llmc.targets.base import GpuTarget

Expr = Any
CHUNK = UNIT
"""Columns that are read together."""

WORD = "int32"
"""The dtype of two 16-bit elements in one register."""


class Operand(Protocol):
    """A matrix [lines, k]. ``line`` and ``column``, a multiple of :data:`CHUNK`, are int64; lines exist, columns may not."""

    def values(self, line: Expr, column: Expr) -> list[Expr]:
        """The chunk as float32."""

    def keep(self, stage: Expr, at: int, line: Expr, column: Expr) -> None:
        """The chunk to the register array ``stage``, from ``at`` on, in its dtype."""


class Floats:
    """A matrix of floats. Columns from k on are ``0`` if ``padded``, else any that exist (where the other operand has zeros)."""

    def __init__(self, target: GpuTarget, buffer: Expr, k: int, *, padded: bool) -> None:
        self.target, self.buffer, self.k = target, buffer, k
        self.dtype = str(buffer.ty.dtype)
        self.lanes = common_lanes(target, [self.dtype], CHUNK, k)
        self.padded = padded

    def values(self, line: Expr, column: Expr) -> list[Expr]:
        found: list[Expr] = []
        for part in range(0, CHUNK, self.lanes):
            at = bind(column + part)
            # Loads stay in range where nothing is used: TVM may load ahead of a test.
            loaded = load(self.buffer, line, tirx.min(at, self.k - self.lanes), lanes=self.lanes)
            found += [tirx.Select(at < self.k, v, f32(0.0)) for v in loaded] if self.padded else loaded
        return found

    def keep(self, stage: Expr, at: int, line: Expr, column: Expr) -> None:
        dtype = str(stage.ty.dtype)
        if dtype not in (WORD, self.dtype) or self.lanes == 1:
            _keep_all(self.target, stage, at, self.values(line, column), self.dtype)
            return
        size = 2 if dtype == WORD else 1
        lanes = self.lanes // size
        for part in range(0, CHUNK, self.lanes):
            place, begin = at + part // size, bind(column + part)

            def fetch(place: int = place, begin: Expr = begin) -> None:
                value = raw(self.buffer, line, tirx.min(begin, self.k - self.lanes), lanes=self.lanes)
                store(stage, tirx.reinterpret(vector(dtype, lanes), value) if size == 2 else value, place, lanes=lanes)

            def clear(place: int = place) -> None:
                for i in range(lanes):
                    store(stage, tirx.const(0, dtype), place + i)

            if self.padded:
                when(begin < self.k, fetch, clear)
            else:
                fetch()


class Codes:
    """A quantized matrix; its values are rounded to ``dtype`` where they are kept. Columns from k on are some finite numbers."""

    def __init__(self, target: GpuTarget, units: Units, k: int, dtype: str) -> None:
        self.target, self.units, self.dtype = target, units, dtype
        self.last = units.at.columns // UNIT - 1

    def values(self, line: Expr, column: Expr) -> list[Expr]:
        return self.units.load(line, bind(tirx.min(tirx.floordiv(column, UNIT), self.last)))

    def keep(self, stage: Expr, at: int, line: Expr, column: Expr) -> None:
        _keep_all(self.target, stage, at, self.values(line, column), self.dtype)


def _keep_all(target: GpuTarget, stage: Expr, at: int, values: list[Expr], dtype: str) -> None:
    """Float32 values to a stage, rounded to ``dtype`` where they are kept as words or in it."""
    held = str(stage.ty.dtype)
    if held != WORD:
        for i, value in enumerate(values):
            store(stage, value if held == "float32" else narrow(value, held), at + i)
        return
    halves = registers(len(values), held_as(dtype))
    for i, value in enumerate(values):
        store(halves, narrow(value, dtype), i)
    store(stage, tirx.reinterpret(vector(WORD, len(values) // 2), read(halves, 0, lanes=len(values))), at, lanes=len(values) // 2)


def weight_line(column: Expr, span: int, first: Expr, results: int, gated: bool) -> Expr:
    """The line of the weights that is column ``column`` of a tile whose first result is ``first``; one that exists.

    If gated, each ``span`` columns are the gates of span / 2 results, then their factors, which lie ``results`` lines further.
    """
    if not gated:
        return bind(tirx.min(first + column, results - 1))
    half = span // 2
    inside = bind(tirx.floormod(column, span))
    result = first + tirx.floordiv(column, span) * half + tirx.floormod(inside, half)
    return bind(tirx.min(result, results - 1) + tirx.floordiv(inside, half) * results)
