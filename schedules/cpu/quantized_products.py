"""The register tile behind products with quantized weights of :mod:`.layout_panel`: a panel of weight rows times rows of int8.

The products of a block of 32 columns are exact integers, by the instruction set's dot product (:mod:`.quantized_dot`); block sums
are scaled and added in float32, in the order of k. So a row's result depends neither on the number of rows nor on where the
integers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import count
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import quantized_rows
from llmc.schedules.cpu.emit import Simd, bind, elements, i64, local, prefetch, read, shuffle, store, vector, when
from llmc.schedules.cpu.layout_panel import BLOCK, QUADS, ROWS, Panels
from llmc.schedules.cpu.math import Math
from llmc.schedules.cpu.quantized_dot import Dot
from llmc.schedules.cpu.two_level_scales import TwoLevel
from llmc.schedules.protocol import KernelCall

Expr = Any
UNROLLED = 2
"""Blocks that share a scale and are written out one after the other; more are a loop."""


class Products:
    """The products of a panel with a tile of rows."""

    def __init__(
        self,
        call: KernelCall,
        dot: Dot,
        simd: Simd,
        buffers: dict[str, Expr],
        rows: quantized_rows.Rows,
        at: Panels,
        ahead: int,
        beyond: Expr,
    ) -> None:
        """``beyond``: more bytes than a panel has, which the compiler does not know."""
        self.call, self.dot, self.simd, self.buffers, self.rows, self.at = call, dot, simd, buffers, rows, at
        self.ahead, self.beyond = ahead, beyond
        self.scheme = scheme(call.attr("scheme"))
        self.lanes = dot.lanes

    def over(self, weight: dict[str, Expr]) -> Products:
        """The same tile over another weight's panels and bias."""
        other = copy(self)
        other.buffers = {**self.buffers, **weight}
        return other

    def emit(self, panels: Sequence[Expr], first: Expr, count: int) -> None:
        """The products of ``count`` rows from ``first`` on. One row streams all panels side by side as they lie. Several take a
        panel after the other, and one vector of weight rows at a time: its codes fit the registers."""
        parts = range(self.dot.parts)
        if count == 1:
            self._parts([(panel, part) for panel in panels for part in parts], first, count)
            return
        for panel in panels:
            for part in parts:
                self._parts([(panel, part)], first, count)

    def _parts(self, vectors: Sequence[tuple[Expr, int]], first: Expr, count: int) -> None:
        """``vectors``: of weight rows, each a panel and which of its vectors."""
        at = self.at
        acc = [[self._cleared() for _ in range(count)] for _ in vectors]
        # With several blocks to a scale, a group's sum is kept apart until it is complete.
        group = acc if at.blocks == 1 else [[self._cleared() for _ in range(count)] for _ in vectors]
        with T.serial(0, at.records) as r:
            record = bind(i64(r) * at.record_bytes)
            for (panel, part), total, part_sum in zip(vectors, acc, group, strict=True):
                if count == 1 and self.ahead and part == 0:
                    prefetch(self.buffers["panels"], panel, record + self.ahead, at.record_bytes)
                self._record(panel, part, record, i64(r), first, total, part_sum)
        for (panel, part), total in zip(vectors, acc, strict=True):
            for i in range(count):
                self._finish(self._get(total[i]), part, first + i, panel)

    def _record(
        self, panel: Expr, part: int, record: Expr, number: Expr, first: Expr, acc: Sequence[Expr], group: Sequence[Expr]
    ) -> None:
        """The record ``number`` at byte ``record`` of a panel times the rows from ``first`` on, one for each of ``acc``."""
        at = self.at
        scales = [bind(self._scales(panel, record, part, s)) for s in range(at.sets)]
        offsets = [self._offsets(panel, record, part, s) for s in range(at.sets)]

        def block(b: Expr) -> None:
            self._block(panel, part, record + b * at.block_bytes, first, bind(number * at.blocks + b), scales, offsets, acc, group)

        if at.blocks == 1:
            block(i64(0))
            return
        if at.blocks <= UNROLLED:
            for b in range(at.blocks):
                block(i64(b))
        else:
            with T.serial(0, at.blocks) as b:
                block(i64(b))
        for total, part_sum in zip(acc, group, strict=True):
            self._put(total, self.simd.fma(self._get(part_sum), scales[0], self._get(total)))
            self._put(part_sum, self.simd.splat(0.0, self.lanes))

    def _block(
        self,
        panel: Expr,
        part: int,
        block: Expr,
        first: Expr,
        column: Expr,
        scales: list[Expr],
        offsets: list[Expr],
        acc: Sequence[Expr],
        group: Sequence[Expr],
    ) -> None:
        """Rows of x times the block of columns ``column``, which is at byte ``block`` of a panel."""
        at, rows = self.at, self.rows
        blocks = self._blocks(first, column, len(acc))
        for s in range(at.sets):
            sums = self._sums(panel, part, block, blocks, s)
            for i, of_row in enumerate(blocks):
                scale = self.simd.splat(bind(read(rows.scales, of_row)), self.lanes)
                offset = None if rows.offsets is None else self.simd.splat(read(rows.offsets, of_row * at.sets + s), self.lanes)
                self._add(sums[i], scale, offset, scales[s], offsets[s], acc[i], group[i])

    def _blocks(self, first: Expr, column: Expr, count: int) -> list[Expr]:
        """The numbers of the blocks of columns ``column`` of ``count`` rows."""
        return [bind(self.rows.block(first + i, column)) for i in range(count)]

    def _sums(self, panel: Expr, part: int, block: Expr, blocks: Sequence[Expr], s: int) -> list[Expr]:
        """For each of ``blocks`` of x, its products with set ``s`` of the codes at byte ``block`` of a panel."""
        at, rows = self.at, self.rows
        quads, zero = QUADS // at.sets, tirx.const(0, "int32")
        starts = [zero if rows.starts is None else read(rows.starts, of_row * at.sets + s) for of_row in blocks]
        places = [of_row * BLOCK + 4 * s * quads for of_row in blocks]
        turns = count(s * QUADS)

        def apart(turn: Callable[[], None]) -> None:
            # Instructions stay in their basic block: without one for each turn, LLVM has a row's sum computed after the other.
            number = next(turns)
            if number == s * QUADS:
                turn()
            else:
                when(block + number < self.beyond, turn)

        def quad(number: int) -> Expr:
            return self.dot.quad(self.buffers["panels"], panel, block, part, number)

        return self.dot.of_rows(starts, quad, range(s * quads, (s + 1) * quads), rows.codes, places, apart)

    def _add(self, integers: Expr, scale: Expr, offset: Expr | None, scales: Expr, offsets: Expr, acc: Expr, group: Expr) -> None:
        """Scaled products to ``group``, and to ``acc`` what the weights' minima add."""
        simd = self.simd
        value = bind(tirx.Cast(vector("float32", self.lanes), integers))
        if self.scheme.offset == "zero_point":
            value = bind(simd.fma(offsets, offset, value))
        if self.at.blocks == 1:
            self._put(acc, simd.fma(value, bind(scales * scale), self._get(acc)))
        else:
            self._put(group, simd.fma(value, scale, self._get(group)))
        if self.scheme.offset == "minimum":
            self._put(acc, simd.fma(offsets, offset, self._get(acc)))

    def _cleared(self) -> Expr:
        register = local(self.lanes)
        self._put(register, self.simd.splat(0.0, self.lanes))
        return register

    def _get(self, register: Expr) -> Expr:
        return read(register, 0, lanes=self.lanes)

    def _put(self, register: Expr, value: Expr) -> None:
        store(register, value, 0, lanes=self.lanes)

    def _scales(self, panel: Expr, record: Expr, part: int, s: int) -> Expr:
        if self.at.field_bytes:
            return self._two_level(panel).scale(record, s, part * self.lanes, self.lanes)
        size = self.at.scale_bytes
        return self._floats(panel, record + self.at.scales_at + (s * ROWS + part * self.lanes) * size)

    def _offsets(self, panel: Expr, record: Expr, part: int, s: int) -> Expr:
        at = self.at
        if at.field_bytes:
            return (
                self._two_level(panel).minimum(record, s, part * self.lanes, self.lanes)
                if self.scheme.offset == "minimum"
                else None
            )
        start = record + at.offsets_at + (s * ROWS + part * self.lanes) * at.offset_bytes
        if self.scheme.offset == "minimum":
            return bind(self._floats(panel, start))
        if self.scheme.offset == "zero_point":
            return bind(tirx.Cast(vector("float32", self.lanes), read(self.buffers["panels"], panel, start, lanes=self.lanes)))
        return None

    def _two_level(self, panel: Expr) -> TwoLevel:
        return TwoLevel(
            self.simd, self.scheme, self.at, lambda start, lanes: read(self.buffers["panels"], panel, start, lanes=lanes)
        )

    def _floats(self, panel: Expr, start: Expr) -> Expr:
        """A vector of scales or minima as float32."""
        raw = read(self.buffers["panels"], panel, start, lanes=self.at.scale_bytes * self.lanes)
        return self.simd.widen(tirx.reinterpret(vector(self.at.scale_dtype, self.lanes), raw), self.at.scale_dtype, self.lanes)

    def _finish(self, value: Expr, part: int, row: Expr, panel: Expr) -> None:
        """Bias, activation, residual and the store of vector ``part``; of the last panel only the rows that exist."""
        rest = self.at.o % ROWS

        def whole() -> None:
            self._store(value, row, panel * ROWS + part * self.lanes, self.lanes)

        def short() -> None:
            for start, width in elements(rest, self.lanes):
                of, lane = divmod(start, self.lanes)
                if of != part:
                    continue
                piece = value if width == self.lanes else shuffle([value], range(lane, lane + width))
                self._store(piece, row, panel * ROWS + start, width)

        if rest == 0:
            whole()
        elif self.at.panels == 1:
            short()
        else:
            when(panel < self.at.panels - 1, whole, short)

    def _store(self, value: Expr, row: Expr, first: Expr, lanes: int) -> None:
        call, simd, buffers = self.call, self.simd, self.buffers
        if call.attr("bias"):
            value = value + simd.load(buffers["bias"], first, lanes=lanes)
        value = Math(simd, lanes).activate(call.attr("activation"), value)
        if call.attr("residual"):
            value = value + simd.load(buffers["residual"], row, first, lanes=lanes)
        store(buffers["out"], value, row, first, lanes=lanes)
