"""The register tile behind every matrix product: rows of x times rows of weight, both read where they are stored.

SIMD lanes run along k. Each (row, output) pair owns one vector accumulator, so its additions come in the order of k whatever
tile it is part of; the lanes are added in the fixed tree of :meth:`Simd.sums`. A k that is no multiple of the vector is
finished by a vector that ends at k, with the lanes of x that were already counted set to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Simd, bind, i64, local, read, store

Expr = Any
Index = tuple[Expr, ...]


@dataclass(frozen=True)
class TileShape:
    """Rows of x and rows of weight (a power of two) that are multiplied in registers at once."""

    rows: int
    outputs: int


def tile_shape(simd: Simd) -> TileShape:
    """Three quarters of the registers hold accumulators; the rest hold operands."""
    outputs = min(8 if simd.registers >= 32 else 4, simd.lanes)
    return TileShape(max(1, simd.registers * 3 // 4 // outputs), outputs)


def tile_shapes(simd: Simd) -> list[TileShape]:
    """What else fits the registers: :func:`tile_shape` first, then lower and wider, higher and narrower ones."""
    most = simd.registers * 7 // 8
    shapes = [(rows, outputs) for outputs in (1, 2, 4, 8) for rows in (1, 2, 3, 4, 6, 8, 12)]
    fitting = [TileShape(r, o) for r, o in shapes if o <= simd.lanes and most // 2 <= r * o <= most]
    return list(dict.fromkeys([tile_shape(simd), *fitting]))


def output_blocks(o: int, width: int) -> list[tuple[int, int]]:
    """(start, outputs) of the blocks that remain after the full ones: powers of two, largest first."""
    blocks, start = [], o - o % width
    while start < o:
        while width > o - start:
            width //= 2
        blocks.append((start, width))
        start += width
    return blocks


def dot_tile(
    simd: Simd,
    x: Expr,
    x_rows: Sequence[Index],
    weight: Expr,
    w_rows: Sequence[Index],
    k: int,
    stream: bool = False,
) -> list[Expr]:
    """Emit the products of every x row with every weight row; per x row, a vector with one sum per weight row.

    ``x_rows`` and ``w_rows`` are index prefixes; the last dimension of both buffers is k. ``stream`` walks the weight rows
    one after the other, for weights that come from memory; else all of them advance together. The sums are the same bits.
    """
    tile = _Tile(simd, x, x_rows, weight, w_rows, k)
    tile.clear()
    full, rest = divmod(k, tile.lanes)
    together = list(range(len(w_rows)))
    for columns in [[j] for j in together] if stream else [together]:
        tile.advance(i64(0), full, columns)
        if rest:
            tile.tail(columns)
    return tile.sums()


def dot_block(
    simd: Simd,
    x: Expr,
    x_rows: Sequence[Index],
    weight: Expr,
    w_rows: Sequence[Index],
    k: int,
    scratch: Expr,
    slots: Sequence[Expr],
    first: Expr,
    count: int,
    last: bool,
) -> None:
    """Advance the accumulators in ``scratch`` over ``count`` elements of k from ``first`` on, and the tail if ``last``.

    ``slots[i]`` is the vector of ``scratch`` where x row i's accumulators start. Between the blocks of a long k whole vectors
    are put aside, not sums, so that the additions are those of :func:`dot_tile`.
    """
    tile = _Tile(simd, x, x_rows, weight, w_rows, k)
    tile.move(scratch, slots, load=True)
    columns = list(range(len(w_rows)))
    tile.advance(first, count // tile.lanes, columns)
    if last and k % tile.lanes:
        tile.tail(columns)
    tile.move(scratch, slots, load=False)


class _Tile:
    """The accumulators of a tile and the steps that advance them."""

    def __init__(self, simd: Simd, x: Expr, x_rows: Sequence[Index], weight: Expr, w_rows: Sequence[Index], k: int) -> None:
        self.simd, self.x, self.x_rows, self.weight, self.w_rows, self.k = simd, x, x_rows, weight, w_rows, k
        self.lanes = simd.widest(k)
        self.acc = [[local(self.lanes) for _ in w_rows] for _ in x_rows]

    def clear(self) -> None:
        for a in (a for row in self.acc for a in row):
            store(a, self.simd.splat(0.0, self.lanes), 0, lanes=self.lanes)

    def move(self, scratch: Expr, slots: Sequence[Expr], load: bool) -> None:
        """Load the accumulators from ``scratch``, or store them there."""
        for row, slot in zip(self.acc, slots, strict=True):
            for j, a in enumerate(row):
                at = (slot + j) * self.lanes
                if load:
                    store(a, read(scratch, at, lanes=self.lanes), 0, lanes=self.lanes)
                else:
                    store(scratch, read(a, 0, lanes=self.lanes), at, lanes=self.lanes)

    def advance(self, first: Expr, steps: int, columns: Sequence[int]) -> None:
        with T.serial(0, steps) as kk:
            self._step(columns, first + i64(kk) * self.lanes, 0)

    def tail(self, columns: Sequence[int]) -> None:
        self._step(columns, i64(self.k - self.lanes), self.lanes - self.k % self.lanes)

    def sums(self) -> list[Expr]:
        return [self.simd.sums([read(a, 0, lanes=self.lanes) for a in row]) for row in self.acc]

    def _step(self, columns: Sequence[int], start: Expr, counted: int) -> None:
        """Multiply one vector of k; the first ``counted`` lanes of x were part of an earlier step."""
        lanes, xs = self.lanes, []
        for r in self.x_rows:
            value = self.simd.load(self.x, *r, start, lanes=lanes)
            if counted:
                fresh = tirx.Ramp(0, 1, lanes) >= tirx.Broadcast(tirx.const(counted, "int32"), lanes)
                value = tirx.Select(fresh, value, self.simd.splat(0.0, lanes))
            xs.append(bind(value))
        for j in columns:
            value = bind(self.simd.load(self.weight, *self.w_rows[j], start, lanes=lanes))
            for i, xv in enumerate(xs):
                store(self.acc[i][j], self.simd.fma(xv, value, read(self.acc[i][j], 0, lanes=lanes)), 0, lanes=lanes)
