"""The inner part of paged attention: online softmax over chunks of positions (Milakov & Gimelshein, 2018; Dao et al., 2022).

Positions are taken in chunks that start at multiples of ``chunk``, whatever the page size, the batch or the phase. A chunk's
keys are transposed once into a scratch buffer, so that SIMD lanes run along *positions* in q·k (no horizontal sums) and
along the value's elements in p·v; several queries (the heads of a group, or rows) share every load of keys and values.

A chunk that a row may not see at all leaves its state bit for bit as it was (the correction factor is exp(0) = 1 and every
weight is 0), so a row's result does not depend on which other rows share its tile. Every segment of positions starts with an empty
state and is merged when it is done (:mod:`llmc.schedules.cpu.states`), so it does not depend on who went over which segment either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Simd, bind, ceildiv, each_vector, elements, i64, keep, local, read, shuffle, store, when
from llmc.schedules.cpu.kv_codes import Side
from llmc.schedules.cpu.math import Math
from llmc.schedules.cpu.states import MASKED, SEGMENT, States

Expr = Any


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention layer: ``group`` query heads share a KV head; ``rows`` are the most rows of a task; ``queries`` are
    multiplied at once."""

    group: int
    d: int
    dv: int
    page_size: int
    rows: int
    queries: int


@dataclass(frozen=True)
class Scores:
    """What happens to q·k before the softmax; ``window`` and ``span`` (chunked attention) are -1, ``softcap`` 0, if unused."""

    scale: float
    softcap: float
    window: int
    span: int


def chunk_size(simd: Simd, d: int, dv: int) -> int:
    """Positions of a chunk: 64, or 32 where 64 keys and values would not fit the first-level cache."""
    return max(simd.lanes, 64 if (d + dv) * 64 * 4 <= 32 * 1024 else 32)


class Flash:
    """Emits the attention of a run of consecutive rows of one sequence to one KV head."""

    def __init__(
        self,
        simd: Simd,
        heads: Heads,
        scores: Scores,
        q: Expr,
        keys: Side,
        values: Side,
        table: Expr,
        sinks: Expr | None,
    ):
        self.simd, self.heads, self.scores = simd, heads, scores
        self.q, self.table, self.sinks = q, table, sinks
        self.key_side, self.value_side = keys, values
        self.chunk = chunk_size(simd, heads.d, heads.dv)
        self.lanes = simd.lanes
        budget = simd.registers * 3 // 4
        self.query_tile = heads.queries
        self.row_tile = max(1, self.query_tile // heads.group)
        self.position_tile = max(1, min(self.chunk // self.lanes, budget // self.query_tile))
        self.value_tile = max(1, budget // self.query_tile)

    def allocate(self) -> None:
        """Emit the scratch buffers of a task."""
        h = self.heads
        self.keys = local(self.chunk, h.d)
        self.values = local(h.dv, self.chunk)
        self.page = local(self.chunk, dtype="int64")
        self.slot = local(self.chunk, dtype="int64")
        if self.key_side.scheme is not None:
            self.parameters = local(self.chunk, self.key_side.scheme.parameters(h.d))
        self.weights = local(self.chunk, self.query_tile)
        self.states = self.new_states()
        self.alpha = local(1, self.query_tile)

    def new_states(self) -> States:
        """Emit the states of a task's queries."""
        h = self.heads
        return States(self.simd, h.group, h.dv, h.rows * h.group, self.sinks)

    def run(self, sequence: Expr, head: Expr, first: Expr, rows: Expr, position: Expr, low: Expr, high: Expr) -> None:
        """Set 0 of the states becomes that of rows ``first .. first + rows`` of the packed batch, the first at ``position`` of its
        ``sequence``, over the segments ``low .. high``."""
        last = bind(position + rows - 1)
        self.states.start(i64(0), rows)
        lowest = keep(tirx.floordiv(self._lowest(position), self.chunk))
        with T.serial(low, high) as s:
            segment = bind(i64(s))
            self.set = self.states.set_of(segment, low)
            when(segment > low, lambda: self.states.start(self.set, rows))
            begin = tirx.max(lowest, segment * (SEGMENT // self.chunk))
            end = tirx.min(tirx.floordiv(last, self.chunk), segment * (SEGMENT // self.chunk) + (SEGMENT // self.chunk - 1))
            with T.serial(keep(begin), keep(end + 1)) as c:
                self._chunk(sequence, head, first, rows, position, bind(i64(c) * self.chunk), last)
            when(segment > low, lambda: self.states.merge(rows))

    def segments(self, first: Expr, last: Expr) -> tuple[Expr, Expr]:
        """The segments that rows at positions ``first .. last`` of a sequence see: the first, and the one behind the last."""
        return keep(tirx.floordiv(self._lowest(first), SEGMENT)), keep(tirx.floordiv(last, SEGMENT) + 1)

    def _chunk(self, sequence: Expr, head: Expr, first: Expr, rows: Expr, position: Expr, base: Expr, last: Expr) -> None:
        """The positions from ``base`` on for all rows, at most up to the ``last``."""
        count = bind(tirx.min(i64(self.chunk), last + 1 - base))
        self._gather(sequence, head, base, count)

        def tile(row: Expr, size: int) -> None:
            # Causality: a tile whose last row comes before the chunk has nothing to do, nor has one beyond it.
            low, high = position + row, position + row + (size - 1)
            seen = tirx.And(high >= base, self._lowest(low) < base + self.chunk)
            when(seen, lambda: self._tile(head, first, position, row, size, base, count))

        full = tirx.floordiv(rows, self.row_tile)
        with T.serial(0, full) as t:
            tile(i64(t) * self.row_tile, self.row_tile)
        if self.row_tile > 1:
            with T.serial(full * self.row_tile, rows) as row:
                tile(i64(row), 1)

    def _lowest(self, position: Expr) -> Expr:
        """The first position that the row at ``position`` sees."""
        low = i64(0)
        if self.scores.window > 0:
            low = tirx.max(low, position - (self.scores.window - 1))
        if self.scores.span > 0:
            low = tirx.max(low, tirx.floordiv(position, self.scores.span) * self.scores.span)
        return low

    def _gather(self, sequence: Expr, head: Expr, base: Expr, count: Expr) -> None:
        """Bring a chunk to scratch as float32: keys transposed to [d, chunk], values as [chunk, dv]."""
        h, lanes, keys = self.heads, self.lanes, self.key_side
        with T.serial(0, ceildiv(count, lanes) * lanes) as r:
            # Beyond the last position there is nothing to read; that one's lanes are masked or skipped later.
            position = bind(base + tirx.min(i64(r), count - 1))
            page, slot = (
                bind(i64(self.table[sequence, tirx.floordiv(position, h.page_size)])),
                bind(tirx.floormod(position, h.page_size)),
            )
            store(self.page, page, i64(r))
            store(self.slot, slot, i64(r))
            for side in (keys, self.value_side):
                side.ask(page, head, slot)
            for i in range(keys.scheme.parameters(h.d) if keys.scheme else 0):
                store(self.parameters, keys.parameter(page, head, slot, i), i64(i * self.chunk) + i64(r))

        def transpose(block: Expr, start: Expr, group: Expr) -> None:
            at = [bind(block * lanes + r) for r in range(lanes)]
            rows = [bind(keys.load(read(self.page, a), head, read(self.slot, a), start, lanes)) for a in at]
            for i, column in enumerate(transposed(rows)):
                store(
                    self.keys,
                    self._scaled(column, group, block * lanes, lanes),
                    (start + i) * self.chunk + block * lanes,
                    lanes=lanes,
                )

        whole = h.d // lanes * lanes
        with T.serial(0, ceildiv(count, lanes)) as b:
            block = bind(i64(b))
            if whole:
                with T.serial(0, whole // lanes) as s:
                    start = bind(i64(s) * lanes)
                    transpose(block, start, self._group(start))
            if whole and whole < h.d and keys.scheme is None:
                transpose(block, i64(h.d - lanes), i64(0))
            elif whole < h.d:
                with T.serial(0, lanes) as r, T.serial(whole, h.d) as e:
                    at, element = bind(block * lanes + i64(r)), bind(i64(e))
                    value = keys.load(read(self.page, at), head, read(self.slot, at), element, 1)
                    store(self.keys, self._scaled(value, self._group(element), at, 1), element * self.chunk + at)
        with T.serial(0, count) as r:
            at = bind(i64(r))
            self._gather_value(bind(read(self.page, at)), head, bind(read(self.slot, at)), at)

    def _group(self, element: Expr) -> Expr:
        """The group of a key's element."""
        scheme = self.key_side.scheme
        return bind(tirx.floordiv(element, scheme.span(self.heads.d))) if scheme else i64(0)

    def _scaled(self, codes: Expr, group: Expr, position: Expr, lanes: int) -> Expr:
        """One element of the keys of consecutive positions of the chunk, from codes to values."""
        scheme = self.key_side.scheme
        if scheme is None:
            return codes
        value = codes * read(self.parameters, group * self.chunk + position, lanes=lanes)
        if not scheme.minimum:
            return value
        return value + read(self.parameters, (group + scheme.groups(self.heads.d)) * self.chunk + position, lanes=lanes)

    def _gather_value(self, page: Expr, head: Expr, slot: Expr, at: Expr) -> None:
        dv, side = self.heads.dv, self.value_side
        scheme = side.scheme
        if scheme is None:
            each_vector(
                dv,
                self.lanes,
                lambda start, width: store(self.values, side.load(page, head, slot, start, width), at * dv + start, lanes=width),
            )
            return
        span, groups = scheme.span(dv), scheme.groups(dv)
        for group in range(groups):
            scale = bind(side.parameter(page, head, slot, group))
            minimum = bind(side.parameter(page, head, slot, groups + group)) if scheme.minimum else None

            def copy(
                start: Expr, width: int, first: int = group * span, scale: Expr = scale, minimum: Expr | None = minimum
            ) -> None:
                value = side.load(page, head, slot, first + start, width) * self.simd.splat(scale, width)
                value = value if minimum is None else value + self.simd.splat(minimum, width)
                store(self.values, value, at * dv + first + start, lanes=width)

            each_vector(min(span, dv - group * span), self.lanes, copy)

    def _tile(self, head: Expr, first: Expr, position: Expr, row: Expr, size: int, base: Expr, count: Expr) -> None:
        """One chunk for ``size`` rows and all heads of the group, at most ``query_tile`` queries at a time."""
        group = self.heads.group
        width = min(group, self.query_tile)
        for j in range(0, group, width):
            queries = [(row + r, j + jj) for r in range(size) for jj in range(min(width, group - j))]
            self._scores(queries, head, first)
            for slot, (r, jj) in enumerate(queries):
                self._softmax(slot, bind(self.set + r * group + jj), bind(position + r), base)
            self._accumulate([self.set + r * group + jj for r, jj in queries], count)

    def _scores(self, queries: list[tuple[Expr, int]], head: Expr, first: Expr) -> None:
        """weights[slot, position] = q · k, in the order of the key's elements."""
        step = self.position_tile * self.lanes
        for start in range(0, self.chunk, step):
            offsets = range(start, min(self.chunk, start + step), self.lanes)
            acc = [[local(self.lanes) for _ in offsets] for _ in queries]
            for a in (a for row in acc for a in row):
                store(a, self.simd.splat(0.0, self.lanes), 0, lanes=self.lanes)
            with T.serial(0, self.heads.d) as e:
                element = bind(i64(e))
                keys = [bind(read(self.keys, element * self.chunk + o, lanes=self.lanes)) for o in offsets]
                for slot, (r, j) in enumerate(queries):
                    value = self.simd.load(self.q, first + r, head * self.heads.group + j, element)
                    value = bind(self.simd.splat(value, self.lanes))
                    for a, key in zip(acc[slot], keys, strict=True):
                        store(a, self.simd.fma(value, key, read(a, 0, lanes=self.lanes)), 0, lanes=self.lanes)
            for slot in range(len(queries)):
                for a, o in zip(acc[slot], offsets, strict=True):
                    store(self.weights, read(a, 0, lanes=self.lanes), slot * self.chunk + o, lanes=self.lanes)

    def _softmax(self, slot: int, query: Expr, position: Expr, base: Expr) -> None:
        """Scores of one query to weights; its running maximum and total, and the factor for what was summed before."""
        lanes, math = self.lanes, Math(self.simd, self.lanes)
        low = bind(self._lowest(position))
        offsets = range(0, self.chunk, lanes)
        visible, scores = [], []
        for o in offsets:
            at = tirx.Broadcast(tirx.Cast("int32", base + o), lanes) + tirx.Ramp(0, 1, lanes) if lanes > 1 else base + o
            inside = at <= _splat_index(position, lanes)
            if self.scores.window > 0 or self.scores.span > 0:
                inside = tirx.And(inside, at >= _splat_index(low, lanes))
            visible.append(inside)
            value = read(self.weights, slot * self.chunk + o, lanes=lanes) * self.simd.splat(self.scores.scale, lanes)
            if self.scores.softcap > 0:
                capped = math.tanh(value * self.simd.splat(1.0 / self.scores.softcap, lanes))
                value = capped * self.simd.splat(self.scores.softcap, lanes)
            scores.append(keep(tirx.Select(visible[-1], value, self.simd.splat(MASKED, lanes))))
        largest = scores[0]
        for value in scores[1:]:
            largest = keep(tirx.max(largest, value))
        before = bind(read(self.states.tops, query))
        top = keep(tirx.max(before, self.simd.largest(largest)))
        store(self.states.tops, top, query)
        alpha = Math(self.simd, 1).exp(before - top)
        store(self.alpha, alpha, slot)
        total = keep(read(self.states.totals, query * lanes, lanes=lanes) * self.simd.splat(alpha, lanes))
        for o, inside, value in zip(offsets, visible, scores, strict=True):
            weight = keep(tirx.Select(inside, math.exp(value - self.simd.splat(top, lanes)), self.simd.splat(0.0, lanes)))
            store(self.weights, weight, slot * self.chunk + o, lanes=lanes)
            total = keep(total + weight)
        store(self.states.totals, total, query * lanes, lanes=lanes)

    def _accumulate(self, queries: list[Expr], count: Expr) -> None:
        """sums = alpha · sums + weights · values, in the order of positions."""
        dv = self.heads.dv
        pieces = elements(dv, self.lanes)
        for group in (pieces[i : i + self.value_tile] for i in range(0, len(pieces), self.value_tile)):
            acc = [[local(lanes) for _, lanes in group] for _ in queries]
            for slot, query in enumerate(queries):
                for a, (start, lanes) in zip(acc[slot], group, strict=True):
                    before = read(self.states.sums, query * dv + start, lanes=lanes)
                    store(a, bind(before * self.simd.splat(read(self.alpha, slot), lanes)), 0, lanes=lanes)
            with T.serial(0, count) as r:
                at = bind(i64(r))
                values = [bind(read(self.values, at * dv + start, lanes=lanes)) for start, lanes in group]
                for slot in range(len(queries)):
                    weight = bind(read(self.weights, slot * self.chunk + at))
                    for a, value, (_, lanes) in zip(acc[slot], values, group, strict=True):
                        total = self.simd.fma(self.simd.splat(weight, lanes), value, read(a, 0, lanes=lanes))
                        store(a, total, 0, lanes=lanes)
            for slot, query in enumerate(queries):
                for a, (start, lanes) in zip(acc[slot], group, strict=True):
                    store(self.states.sums, read(a, 0, lanes=lanes), query * dv + start, lanes=lanes)


def _splat_index(value: Expr, lanes: int) -> Expr:
    return tirx.Broadcast(tirx.Cast("int32", value), lanes) if lanes > 1 else value


def transposed(rows: list[Expr]) -> list[Expr]:
    """The columns of a square matrix whose rows are vectors, by exchanging ever smaller blocks (Eklundh, 1972)."""
    size = len(rows)
    half = size // 2
    while half:
        for i in (i for i in range(size) if not i & half):
            a, b = rows[i], rows[i + half]
            upper = [lane if not lane & half else size + lane - half for lane in range(size)]
            lower = [lane + half if not lane & half else size + lane for lane in range(size)]
            rows[i], rows[i + half] = bind(shuffle([a, b], upper)), bind(shuffle([a, b], lower))
        half //= 2
    return rows
