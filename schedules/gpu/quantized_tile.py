"""Products of tiles of 16 quantized weight rows with a few rows of x, by one block of threads: what GEMVs over codes are made of.

32 neighbouring threads read a chunk of a tile as the layout :mod:`.layout_mma` has it: thread 4 g + t gets columns of rows g and
g + 8. It sums products of codes; scales, and what all codes of a group are off by, meet the sums of a unit of eight columns. The
chunks of a tile are shared out to the block's groups of 32, whose sums meet in shared memory. The order of additions depends on k
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu.emit import Team, bind, i64, read, registers, shared, store, sync, when
from llmc.schedules.gpu.layout_mma import LANES, ROWS, UNIT
from llmc.schedules.gpu.operand import Floats
from llmc.schedules.gpu.quantized_units import Units
from llmc.targets.base import GpuTarget

Expr = Any
MEMBERS = 4
"""Threads that share a row of a chunk."""


def groups_that_fit(target: GpuTarget) -> list[int]:
    """Groups of 32 threads that a block may have, the usual choice first."""
    return [g for g in (4, 8, 2) if g * LANES <= target.max_threads]


def padded(units: Units, k: int) -> bool:
    """Whether columns are read that x does not have: a matrix is padded to whole blocks, with codes that need not stand for 0."""
    return units.at.columns != k


class TileProducts:
    """The products of ``count`` rows of x with ``sides`` tiles. Every thread of the block makes it, and calls in the same order."""

    def __init__(self, target: GpuTarget, thread: Expr, groups: int, count: int, sides: int) -> None:
        self.groups, self.count, self.sides = groups, count, sides
        self.team = Team(target, thread, groups * LANES, MEMBERS)
        self.group, self.lane = bind(tirx.floordiv(thread, LANES)), bind(tirx.floormod(thread, LANES))
        self.partial = shared(groups * ROWS * count * sides)

    def compute(self, units: Units, tiles: Sequence[Expr], x: Floats, rows: Sequence[Expr]) -> None:
        """Multiply the rows ``rows`` of ``x`` by the tiles of ``units``; :meth:`total` then has the products for all threads."""
        # Of each row of x and each side the sums of weight rows g and g + 8.
        sums, chunks = registers(self.count * self.sides * 2, start=0.0), units.at.chunks

        def chunk(index: Expr) -> None:
            for first_unit, words in units.lane_units(list(tiles), index, self.lane):
                column = bind(first_unit * UNIT)
                values = [[bind(v) for v in x.values(row, column)] for row in rows]
                plain = [bind(sum(v[1:], v[0])) for v in values] if units.shifted else []
                for side in range(self.sides):
                    for half in range(2):
                        codes, scale, shift = words[side][half]
                        for r in range(self.count):
                            dot = codes[0] * values[r][0]
                            for code, value in zip(codes[1:], values[r][1:], strict=True):
                                dot = bind(dot + code * value)
                            at = (r * self.sides + side) * 2 + half
                            scaled = dot if scale is None else dot * scale
                            store(sums, sums[at] + (scaled if shift is None else scaled + plain[r] * shift), at)

        with T.serial(0, -(-chunks // self.groups)) as step:
            index = bind(i64(step) * self.groups + i64(self.group))
            if chunks % self.groups:
                when(index < chunks, lambda: chunk(index))
            else:
                chunk(index)
        in_row = self.count * self.sides
        place = bind((self.group * ROWS + tirx.floordiv(self.lane, MEMBERS)) * in_row)
        for i in range(in_row):
            for half in range(2):
                total = self.team.sum(sums[2 * i + half], MEMBERS)
                when(
                    tirx.floormod(self.lane, MEMBERS).equal(0),
                    lambda total=total, at=half * 8 * in_row + i: store(self.partial, total, place + at),  # type: ignore[misc]
                )
        sync()

    def total(self, inside: Expr, r: Expr, side: int) -> Expr:
        """Row ``inside`` of the side's tile times row ``r`` of those computed last, not yet times :meth:`.Units.row_scale`."""
        in_row = self.count * self.sides
        at = bind(inside * in_row + r * self.sides + side)
        total = read(self.partial, at)
        for other in range(1, self.groups):
            total = total + read(self.partial, at + other * ROWS * in_row)
        return total
