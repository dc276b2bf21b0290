"""What attention keeps of each query while it goes over the positions, and how the states of two segments become one.

A state is the sum of weighted values, the total of the weights (one for each SIMD lane) and the largest score so far, ``top``:
sums = Σ exp(score - top) · value, totals = Σ exp(score - top). Two states of disjoint positions merge by scaling both to the
larger top ("Flash-Decoding", Dao et al., 2023). A state without positions has the top :data:`MASKED` and zeros: merging it
changes no bit of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Simd, bind, each_vector, f32, i64, keep, local, read, store
from llmc.schedules.cpu.math import Math

Expr = Any
MASKED = -1e30
"""The score of a position a row may not see: finite, so that a row without any visible position yet makes no NaN."""
SEGMENT = 256
"""Positions whose state is computed on its own, from a multiple of this number on. All tasks merge segments in order, so a result
is the same whether one task went over all of them or each had its own."""


def width(simd: Simd, dv: int) -> int:
    """Floats of a state in a buffer of states."""
    return dv + simd.lanes + 1


class States:
    """The states of a task's queries, twice: set 0 is what has been merged so far, set 1 the segment at work.

    ``queries``: at most, of a set; ``group``: query heads of a KV head, which a row's queries are.
    """

    def __init__(self, simd: Simd, group: int, dv: int, queries: int, sinks: Expr | None) -> None:
        self.simd, self.group, self.dv, self.queries, self.sinks = simd, group, dv, queries, sinks
        self.lanes = simd.lanes
        self.sums = local(dv, 2 * queries)
        self.totals = local(self.lanes, 2 * queries)
        self.tops = local(1, 2 * queries)

    def set_of(self, segment: Expr, low: Expr) -> Expr:
        """The first query of the set that takes ``segment``, where ``low`` is the first of the task."""
        # Kept: an address with a choice in it is looked through by every analysis of TVM's.
        return keep(tirx.Select(segment > low, i64(self.queries), i64(0)))

    def start(self, first: Expr, rows: Expr) -> None:
        """Empty the states of ``rows`` rows from query number ``first`` on."""

        def empty(query: Expr, row: Expr, j: Expr) -> None:
            def clear(start: Expr, lanes: int) -> None:
                store(self.sums, self.simd.splat(0.0, lanes), (first + query) * self.dv + start, lanes=lanes)

            each_vector(self.dv, self.lanes, clear)
            store(self.totals, self.simd.splat(0.0, self.lanes), (first + query) * self.lanes, lanes=self.lanes)
            store(self.tops, f32(MASKED), first + query)

        self._each_query(rows, empty)

    def merge(self, rows: Expr) -> None:
        """Set 1 into set 0."""
        simd, math = self.simd, Math(self.simd, 1)

        def one(query: Expr, row: Expr, j: Expr) -> None:
            other = bind(query + self.queries)
            before, more = bind(read(self.tops, query)), bind(read(self.tops, other))
            top = keep(tirx.max(before, more))
            kept, added = keep(math.exp(before - top)), keep(math.exp(more - top))

            def add(buffer: Expr, floats: int, start: Expr, lanes: int) -> None:
                old = bind(read(buffer, query * floats + start, lanes=lanes) * simd.splat(kept, lanes))
                new = read(buffer, other * floats + start, lanes=lanes)
                store(buffer, simd.fma(new, simd.splat(added, lanes), old), query * floats + start, lanes=lanes)

            each_vector(self.dv, self.lanes, lambda start, lanes: add(self.sums, self.dv, start, lanes))
            add(self.totals, self.lanes, i64(0), self.lanes)
            store(self.tops, top, query)

        self._each_query(rows, one)

    def save(self, buffer: Expr, index: Expr) -> None:
        """Set 0 of one row to ``buffer``, a flat float32 one, as states number ``index ..``."""

        def put(mine: Expr, at: Expr, theirs: Expr, lanes: int) -> None:
            store(buffer, read(mine, at, lanes=lanes), theirs, lanes=lanes)

        self._copy(index, i64(0), put)

    def load(self, buffer: Expr, index: Expr, first: Expr) -> None:
        """States number ``index ..`` of ``buffer`` as those of one row, from query number ``first`` on."""

        def get(mine: Expr, at: Expr, theirs: Expr, lanes: int) -> None:
            store(mine, read(buffer, theirs, lanes=lanes), at, lanes=lanes)

        self._copy(index, first, get)

    def _copy(self, index: Expr, first: Expr, piece: Callable[[Expr, Expr, Expr, int], None]) -> None:
        """Run ``piece(own buffer, place in it, place in a buffer of states, lanes)`` over the states of one row."""

        def one(query: Expr, row: Expr, j: Expr) -> None:
            mine, theirs = bind(first + query), bind((index + query) * width(self.simd, self.dv))
            each_vector(self.dv, self.lanes, lambda start, n: piece(self.sums, mine * self.dv + start, theirs + start, n))
            piece(self.totals, mine * self.lanes, theirs + self.dv, self.lanes)
            piece(self.tops, mine, theirs + self.dv + self.lanes, 1)

        self._each_query(i64(1), one)

    def finish(self, out: Expr, head: Expr, first: Expr, rows: Expr) -> None:
        """Set 0 as rows ``first ..`` of the result [n, query heads, dv]: sums over totals."""
        simd = self.simd

        def write(query: Expr, row: Expr, j: Expr) -> None:
            total = simd.total(bind(read(self.totals, query * self.lanes, lanes=self.lanes)))
            if self.sinks is None:
                # A padding row has no position at all: its result is 0, not 0 / 0.
                factor = bind(f32(1.0) / tirx.Select(total > f32(0.0), total, f32(1.0)))
            else:
                # The sink is one more position, without a value.
                math = Math(simd, 1)
                sink, top = bind(simd.load(self.sinks, head * self.group + j)), bind(read(self.tops, query))
                largest = keep(tirx.max(sink, top))
                kept = keep(math.exp(top - largest))
                factor = bind(kept / (total * kept + math.exp(sink - largest)))

            def scale(start: Expr, lanes: int) -> None:
                value = read(self.sums, query * self.dv + start, lanes=lanes) * simd.splat(factor, lanes)
                store(out, value, first + row, head * self.group + j, start, lanes=lanes)

            each_vector(self.dv, self.lanes, scale)

        self._each_query(rows, write)

    def _each_query(self, rows: Expr, body: Callable[[Expr, Expr, Expr], None]) -> None:
        """Run ``body(query, row, j)``; query counts the (row, head j of the group) pairs of the task."""
        with T.serial(0, rows * self.group) as t:
            query = bind(i64(t))
            body(query, tirx.floordiv(query, self.group), tirx.floormod(query, self.group))
