"""Products with quantized weights by AMX: 16 rows of x times a panel of 16 weight rows, a block of 32 columns at a time.

A panel's codes are unpacked once for all rows of a row block, to where a tile is read from: its rows are the eight quads. Rows of x
lie so that 16 of them are a tile, too (``together`` of :mod:`.quantized_rows`). A block's integers go to memory, and come back as
vectors to be scaled and added as :mod:`.quantized_products` does: the same numbers in the same order, so the results have the same
bits. Tiles work on two blocks at a time while vectors work on the two before. A tile register is free for other contents only when
the instruction before has read it, so the two blocks have registers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu import tiles
from llmc.schedules.cpu.emit import bind, i64, read, store, when
from llmc.schedules.cpu.layout_panel import BLOCK, QUADS, ROWS
from llmc.schedules.cpu.quantized_products import Products

Expr = Any
FEW = 12
"""Rows at the end that are worth a tile of 16."""
LEAST = 32
"""Rows of a row block that are worth unpacking a panel."""
TURN = 2
"""Blocks that tiles multiply at a time."""
RING = 2 * TURN
"""Blocks whose integers there is room for."""
BLOCK_INTEGERS = ROWS * tiles.ROWS
C, A, B = 0, 2, 4
"""Registers, two of each kind: for the blocks of a turn, or for the sets of columns where a block has two."""


class TileProducts(Products):
    """The products of a panel with any number of rows."""

    @classmethod
    def like(cls, other: Products) -> TileProducts:
        """Those of the same operands."""
        return cls(other.call, other.dot, other.simd, other.buffers, other.rows, other.at, 0, other.beyond)

    def emit_rows(self, panel: Expr, low: Expr, high: Expr) -> Expr:
        """The products of rows ``low`` .. ``high`` if they are at least :data:`LEAST`, but for fewer than :data:`FEW` at the end.
        The first of those that remain; ``low`` is a multiple of 16."""
        whole = tirx.floordiv(high - low + (tiles.ROWS - FEW), tiles.ROWS)
        count = bind(tirx.Select(high - low >= LEAST, whole, i64(0)))
        when(count > 0, lambda: self._tiles(panel, low, high, count))
        return bind(tirx.min(low + count * tiles.ROWS, high))

    def _tiles(self, panel: Expr, low: Expr, high: Expr, count: Expr) -> None:
        stretch = BLOCK // self.at.sets
        shapes = [(tiles.ROWS, 4 * ROWS)] * 2 + [(tiles.ROWS, stretch)] * 2 + [(stretch // 4, 4 * ROWS)] * 2
        codes, integers = (self.at.columns * ROWS, "uint8"), (RING * self.at.sets * BLOCK_INTEGERS, "int32")
        with tiles.configured(shapes, codes, integers, (tiles.ROWS * self.lanes, "float32")) as memory:
            self._unpacked, self._integers, self._totals = memory
            self._end = high
            self._unpack(panel)
            with T.serial(0, count) as i:
                self.emit([panel], bind(low + i64(i) * tiles.ROWS), tiles.ROWS)

    @property
    def _signed(self) -> bool:
        """Whether the products are those of signed codes: the zero of a symmetric scheme is half its range."""
        return self.scheme.offset == "none"

    def _unpack(self, panel: Expr) -> None:
        """All codes of a panel, a byte each: [blocks, quads, 16 rows, 4]."""
        at, width = self.at, 4 * self.lanes
        # The instruction set's own dot product may want codes with another bias.
        moved = ((1 << (at.bits - 1)) if self._signed else 0) - self.dot.bias
        with T.serial(0, at.records) as r, T.serial(0, at.blocks) as b:
            block = bind(i64(r) * at.record_bytes + i64(b) * at.block_bytes)
            first = bind((i64(r) * at.blocks + i64(b)) * (BLOCK * ROWS))
            for part in range(self.dot.parts):
                for q, quad in enumerate(self.dot.codes(self.buffers["panels"], panel, block, part)):
                    value = quad - tirx.Broadcast(tirx.const(moved % 256, "uint8"), width) if moved else quad
                    store(self._unpacked, value, first + (q * 4 * ROWS + part * width), lanes=width)

    def _blocks(self, first: Expr, column: Expr, count: int) -> list[Expr]:
        when((column & i64(TURN - 1)).equal(i64(0)), lambda: self._turn(first, bind(column + TURN)))
        block = bind(first * (self.at.columns // BLOCK) + column * tiles.ROWS)
        self._slot = bind((column & i64(RING - 1)) * (self.at.sets * BLOCK_INTEGERS))
        return [block + i for i in range(count)]

    def _sums(self, panel: Expr, part: int, block: Expr, blocks: Sequence[Expr], s: int) -> list[Expr]:
        start = self._slot + (s * BLOCK_INTEGERS + self._part * self.lanes)
        return [read(self._integers, start + i * ROWS, lanes=self.lanes) for i in range(len(blocks))]

    def _turn(self, first: Expr, column: Expr) -> None:
        """The integers of the blocks from ``column`` on, as many as there are."""
        for i in range(TURN):
            with T.If(column + i < self.at.columns // BLOCK), T.Then():
                self._multiply(first, bind(column + i), i)

    def _multiply(self, first: Expr, column: Expr, turn: int) -> None:
        """The integers of a block of columns of 16 rows of x, to their place in the ring."""
        sets, quads = self.at.sets, QUADS // self.at.sets
        x = bind((first * (self.at.columns // BLOCK) + column * tiles.ROWS) * BLOCK)
        weight = bind(column * (BLOCK * ROWS))
        slot = bind((column & i64(RING - 1)) * (sets * BLOCK_INTEGERS))
        for s in range(sets):
            own = s if sets > 1 else turn
            tiles.zero(C + own)
            tiles.load(A + own, self.rows.codes, x + s * 4 * quads, stride=BLOCK)
            tiles.load(B + own, self._unpacked, weight + s * quads * 4 * ROWS, stride=4 * ROWS)
            tiles.multiply("tdpbssd" if self._signed else "tdpbsud", C + own, A + own, B + own)
            tiles.store(C + own, self._integers, slot + s * BLOCK_INTEGERS, stride=4 * ROWS)

    def _parts(self, vectors: Sequence[tuple[Expr, int]], first: Expr, count: int) -> None:
        """One vector of weight rows with a tile of rows, of which those before :attr:`_end` are finished."""
        ((panel, self._part),) = vectors
        self._first = first
        self._turn(first, i64(0))
        super()._parts(vectors, first, count)
        # What is done to a row is written out once, not for each row of a tile.
        with T.serial(first, tirx.min(first + count, self._end)) as r:
            row = bind(i64(r))
            value = bind(read(self._totals, (row - first) * self.lanes, lanes=self.lanes))
            super()._finish(value, self._part, row, panel)

    def _finish(self, value: Expr, part: int, row: Expr, panel: Expr) -> None:
        """``row`` is one after the other, from :attr:`_first` on."""
        store(self._totals, value, (row - self._first) * self.lanes, lanes=self.lanes)
