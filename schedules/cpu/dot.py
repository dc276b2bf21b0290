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

from llmc.schedules.cpu.emit import Simd, bind, local, read, store

Expr = Any


@dataclass(frozen=True)
class TileShape:
    """Rows of x and rows of weight (a power of two) that are multiplied in registers at once."""

    rows: int
    outputs: int


def tile_shape(simd: Simd) -> TileShape:
    """Three quarters of the registers hold accumulators; the rest hold operands."""
    outputs = min(8 if simd.registers >= 32 else 4, simd.lanes)
    return TileShape(max(1, simd.registers * 3 // 4 // outputs), outputs)


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
    x_rows: Sequence[tuple[Expr, ...]],
    weight: Expr,
    w_rows: Sequence[tuple[Expr, ...]],
    k: int,
    stream: bool = False,
) -> list[Expr]:
    """Emit the products of every x row with every weight row; per x row, a vector with one sum per weight row.

    ``x_rows`` and ``w_rows`` are index prefixes; the last dimension of both buffers is k. ``stream`` walks the weight rows
    one after the other, for weights that come from memory; else all of them advance together. The sums are the same bits.
    """
    lanes = simd.widest(k)
    zero = simd.splat(0.0, lanes)
    acc = [[local(lanes) for _ in w_rows] for _ in x_rows]
    for row in acc:
        for a in row:
            store(a, zero, 0, lanes=lanes)

    def step(columns: Sequence[int], start: Expr, counted: int) -> None:
        xs = []
        for r in x_rows:
            value = simd.load(x, *r, start, lanes=lanes)
            if counted:
                fresh = tirx.Ramp(0, 1, lanes) >= tirx.Broadcast(tirx.const(counted, "int32"), lanes)
                value = tirx.Select(fresh, value, zero)
            xs.append(bind(value))
        for j in columns:
            value = bind(simd.load(weight, *w_rows[j], start, lanes=lanes))
            for i, xv in enumerate(xs):
                store(acc[i][j], simd.fma(xv, value, read(acc[i][j], 0, lanes=lanes)), 0, lanes=lanes)

    full, rest = divmod(k, lanes)
    together = range(len(w_rows))
    for columns in [[j] for j in together] if stream else [list(together)]:
        with T.serial(0, full) as kk:
            step(columns, tirx.Cast("int64", kk) * lanes, 0)
        if rest:
            step(columns, tirx.const(k - lanes, "int64"), lanes - rest)
    return [simd.sums([read(a, 0, lanes=lanes) for a in row]) for row in acc]
