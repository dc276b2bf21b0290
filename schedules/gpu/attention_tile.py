"""The inner part of paged attention on any GPU: a tile of query rows against the pages of one sequence, with an online softmax
(Milakov & Gimelshein, 2018; tiled as in Dao et al., 2022, "FlashAttention").

A tile's *rows* are pairs of a token and a query head that share one KV head. Keys, then values, of ``keys`` positions at a time
come into shared memory; a group of ``keys`` neighbouring threads owns every ``groups``-th row: first each thread computes
the score of one position, then each holds some columns of the result. Chunks start at multiples of ``keys``, so a row has the
same bits whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.kv_layout import scheme_attr
from llmc.schedules.gpu.emit import (
    WIDTH,
    Team,
    bind,
    common_lanes,
    f32,
    held_as,
    i64,
    load,
    raw,
    read,
    registers,
    share,
    shared,
    store,
    store_all,
    sync,
    when,
)
from llmc.schedules.gpu.kv_codes import Side
from llmc.schedules.gpu.math import tanh
from llmc.schedules.kv_pages import page_layout_of, pages_spec, slot_bytes, stored_as
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
OP = "llmc.attend"
MASKED = -1e30
"""The score of a position a row may not see: finite, so that a difference of two of them is no NaN."""

_PAD_BYTES = 16


def make_call(
    hq: int, hk: int, d: int, dv: int = 0, page_size: int = 16, dtype: str = "bfloat16", phase: str = "extend",
    kv_dtype: str = "", **attrs: Any,
) -> KernelCall:  # fmt: skip
    """A call for ``SHAPES``; operands as :mod:`llmc.dialect.paged` says."""
    dv = dv or d
    full = {"scale": d**-0.5, "window": -1, "chunk": -1, "softcap": 0.0, "sinks": 0, "page_size": page_size, "v_dim": dv}
    full |= {**scheme_attr(kv_dtype), **attrs}
    n = "b" if phase == "decode" else "n"
    args = [
        TensorSpec((n, hq, d), dtype), pages_spec(kv_dtype or dtype, hk, page_size, d, dv), TensorSpec(("b", "m"), "int32"),
        TensorSpec(("b",), "int32"), TensorSpec(("b+1",), "int32"),
    ]  # fmt: skip
    if full["sinks"]:
        args.append(TensorSpec((hq,), dtype))
    return KernelCall(OP, tuple(args), TensorSpec((n, hq, dv), dtype), tuple(sorted(full.items())), phase)


def takes(call: KernelCall, target: Target) -> bool:
    """Whether a call is one that the tile computes: known dtypes, head sizes that fit into shared memory."""
    values = [call.args[0], *call.args[5:], call.result]
    if call.op != OP or not isinstance(target, GpuTarget) or any(s.dtype not in WIDTH for s in values):
        return False
    if stored_as(call, call.args[1]) is None:
        return False
    if not all(isinstance(d, int) for s in values for d in s.shape[1:]):
        return False
    return plan(call, target, 1) is not None


def names(call: KernelCall) -> list[str]:
    """The kernel's operands in order."""
    return ["q", "kv_pages", "block_table", "seq_lens", "q_indptr", "sinks"][: len(call.args)]


@dataclass(frozen=True)
class Plan:
    """``rows`` of a tile, ``keys`` of a chunk, and ``groups`` of ``keys`` threads each."""

    rows: int
    keys: int
    groups: int

    @property
    def threads(self) -> int:
        return self.groups * self.keys


def shared_dtype(call: KernelCall) -> str:
    """In which keys and values come into shared memory: as they are stored; codes as float32."""
    return "float32" if "kv_scheme" in dict(call.attrs) else call.args[1].dtype


def plan(call: KernelCall, target: GpuTarget, rows: int) -> Plan | None:
    """The plan for tiles of ``rows`` (a power of two) or, where that is too much shared memory, fewer; None if nothing fits."""
    d, dv, width = int(call.args[0].shape[2]), int(call.attr("v_dim")), WIDTH[shared_dtype(call)]
    keys = min(32, target.warp_size)
    while keys >= 8:
        while rows >= 1:
            found = Plan(rows, keys, min(rows, 256 // keys, target.max_threads // keys))
            scratch = 0 if target.lane_exchange else 8 * found.threads
            used = 4 * rows * (d + 4) + keys * (max(d, dv) * width + _PAD_BYTES) + 4 * rows * keys + scratch
            if used <= target.shared_arrays:
                return found
            rows //= 2
        keys, rows = keys // 2, 4
    return None


class Tile:
    """Emits a tile. ``first_pair`` counts (token, head) pairs from the sequence's first row of this step."""

    def __init__(self, call: KernelCall, target: GpuTarget, shape: Plan, buffers: dict[str, Expr], thread: Expr) -> None:
        self.call, self.target, self.shape, self.buffers, self.thread = call, target, shape, buffers, thread
        self.heads, self.d = (int(v) for v in call.args[0].shape[1:])
        self.group = self.heads // int(call.args[1].shape[1])
        self.dv, self.page_size = int(call.attr("v_dim")), int(call.attr("page_size"))
        self.columns = -(-self.dv // shape.keys)
        self.own = shape.rows // shape.groups
        self.held = shared_dtype(call)
        self.layout = page_layout_of(call, call.args[1], self.d, self.dv)
        pad = _PAD_BYTES // WIDTH[self.held]
        self.key_pitch, self.value_pitch = self.d + pad, self.dv + pad
        # All rows have the pitch's alignment: whole vectors, if d and dv are made of them.
        self.query_pitch = self.d + 4 if self.d % 4 == 0 else self.d
        self.q = shared(shape.rows * self.query_pitch)
        self.kv = shared(shape.keys * max(self.key_pitch, self.value_pitch), held_as(self.held))
        self.p = shared(shape.rows * shape.keys)
        self.team = Team(target, thread, shape.threads, shape.keys)
        self.lane, self.mine = bind(tirx.floormod(thread, shape.keys)), bind(tirx.floordiv(thread, shape.keys))
        self.top = registers(self.own, start=MASKED)
        self.total = registers(self.own, start=0.0)
        self.sums = registers(self.own * self.columns, start=0.0)

    def row(self, i: int) -> Expr:
        """The tile's row that is this thread's i-th."""
        return self.mine + i * self.shape.groups

    def query(self, kv_head: Expr, token: Callable[[Expr], Expr], first_pair: Expr, pairs: Expr) -> None:
        """Load the queries. ``token(pair)`` is the row of q; pairs from ``pairs`` on do not exist and repeat the last one."""
        lanes = common_lanes(self.target, [self.call.args[0].dtype], self.d, self.query_pitch)
        per_row = self.d // lanes

        def copy(item: Expr) -> None:
            r, at = bind(tirx.floordiv(item, per_row)), bind(tirx.floormod(item, per_row) * lanes)
            pair = bind(tirx.max(tirx.min(first_pair + r, pairs - 1), 0))
            head = kv_head * self.group + tirx.floormod(pair, self.group)
            for i, value in enumerate(load(self.buffers["q"], token(pair), head, at, lanes=lanes)):
                store(self.q, value, r * self.query_pitch + at + i)

        share(self.thread, self.shape.threads, self.shape.rows * per_row, copy)

    def attend(self, sequence: Expr, kv_head: Expr, low: Expr, high: Expr, positions: list[tuple[Expr, Expr]]) -> None:
        """Go over positions low ≤ p ≤ high; the i-th row of a thread sees those of ``positions[i]``, first and last."""
        keys, base = self.shape.keys, registers(1, "int64")
        store(base, tirx.floordiv(low, keys) * keys, 0)
        with T.While(base[0] <= high):
            start = bind(base[0])
            sync()  # the values of the chunk before have been read
            self._fetch(sequence, kv_head, start, low, high, keys=True)
            sync()
            self._softmax(self._scores(), bind(start + i64(self.lane)), positions)
            sync()
            self._fetch(sequence, kv_head, start, low, high, keys=False)
            sync()
            self._add_values()
            store(base, start + keys, 0)

    def _fetch(self, sequence: Expr, kv_head: Expr, start: Expr, low: Expr, high: Expr, keys: bool) -> None:
        """A chunk's keys or values. Positions out of sight repeat one in sight: what lies behind the end may be no page at all."""
        pages, table = self.buffers["kv_pages"], self.buffers["block_table"]
        size, pitch = (self.d, self.key_pitch) if keys else (self.dv, self.value_pitch)
        side = None if self.layout.scheme is None else Side(self.target, pages, self.layout, keys=keys)
        if side is not None:
            lanes = side.lanes(pitch)
        else:
            lanes = common_lanes(self.target, [self.held], size, self.page_size * (self.d + self.dv), self.page_size * self.d)
        per_row = size // lanes

        def copy(item: Expr) -> None:
            line, at = bind(tirx.floordiv(item, per_row)), bind(tirx.floormod(item, per_row) * lanes)
            position = bind(tirx.max(low, tirx.min(start + line, high)))
            page = bind(i64(table[sequence, tirx.floordiv(position, self.page_size)]))
            slot = bind(tirx.floormod(position, self.page_size))
            if side is not None:
                store_all(self.kv, side.load(page, kv_head, slot, at, lanes), line * pitch + at)
                return
            place = slot * self.d if keys else self.page_size * self.d + slot * self.dv
            store(self.kv, raw(pages, page, kv_head, place + at, lanes=lanes), line * pitch + at, lanes=lanes)

        share(self.thread, self.shape.threads, self.shape.keys * per_row, copy)

    def _scores(self) -> list[Expr]:
        """The products of this thread's position with each of its rows."""
        lanes = min(4, common_lanes(self.target, [self.held, "float32"], self.d, self.key_pitch, self.query_pitch))
        dots = registers(self.own, start=0.0)
        with T.serial(0, self.d // lanes) as step:
            key = [bind(v) for v in load(self.kv, self.lane * self.key_pitch + step * lanes, lanes=lanes)]
            for i in range(self.own):
                for k, q in zip(key, load(self.q, self.row(i) * self.query_pitch + step * lanes, lanes=lanes), strict=True):
                    store(dots, dots[i] + k * q, i)
        scale, softcap = f32(self.call.attr("scale")), float(self.call.attr("softcap"))
        scores = [bind(dots[i] * scale) for i in range(self.own)]
        return scores if softcap == 0 else [bind(f32(softcap) * tanh(s * f32(1 / softcap))) for s in scores]

    def _softmax(self, scores: list[Expr], position: Expr, seen: list[tuple[Expr, Expr]]) -> None:
        for i, (score, (first, last)) in enumerate(zip(scores, seen, strict=True)):
            visible = bind(tirx.all(position >= first, position <= last))
            score = bind(tirx.Select(visible, score, f32(MASKED)))
            new_top = bind(tirx.max(self.top[i], self.team.max(score, self.shape.keys)))
            correction = bind(tirx.exp(self.top[i] - new_top))
            weight = bind(tirx.Select(visible, tirx.exp(score - new_top), f32(0.0)))
            store(self.p, weight, self.row(i) * self.shape.keys + self.lane)
            store(self.top, new_top, i)
            store(self.total, self.total[i] * correction + self.team.sum(weight, self.shape.keys), i)
            for j in range(self.columns):
                store(self.sums, self.sums[i * self.columns + j] * correction, i * self.columns + j)

    def _add_values(self) -> None:
        keys, columns = self.shape.keys, self.columns
        with T.serial(0, keys) as p:
            # Columns that do not exist repeat the last one; nobody stores them.
            at = [tirx.min(self.lane + j * keys, self.dv - 1) if (j + 1) * keys > self.dv else self.lane + j * keys
                  for j in range(columns)]  # fmt: skip
            values = [load(self.kv, p * self.value_pitch + a)[0] for a in at]
            for i in range(self.own):
                weight = bind(read(self.p, self.row(i) * keys + p))
                for j, value in enumerate(values):
                    store(self.sums, self.sums[i * columns + j] + weight * value, i * columns + j)

    def each_column(self, i: int, body: Callable[[Expr, Expr], None]) -> None:
        """``body(column, sum)`` for the columns of the thread's i-th row."""
        for j in range(self.columns):
            column = bind(i64(self.lane) + j * self.shape.keys)
            value = self.sums[i * self.columns + j]
            if (j + 1) * self.shape.keys <= self.dv:
                body(column, value)
            else:
                when(column < self.dv, lambda column=column, value=value: body(column, value))  # type: ignore[misc]


def first_position(call: KernelCall, position: Expr) -> Expr:
    """The first position that a row at ``position`` sees."""
    window, span = int(call.attr("window")), int(call.attr("chunk"))
    first: Expr = i64(0)
    if window > 0:
        first = tirx.max(first, position - (window - 1))
    if span > 0:
        first = tirx.max(first, tirx.floordiv(position, span) * span)
    return bind(first)


def normalise(buffers: dict[str, Expr], head: Expr, top: Expr, total: Expr) -> Expr:
    """What a row's sums are multiplied by at the end: one over the softmax's denominator, the head's sink included.

    A sequence without positions (padding of a batch) has a sum of 0, and a result of 0.
    """
    if "sinks" not in buffers:
        return bind(tirx.Select(total > 0, f32(1.0) / total, f32(0.0)))
    sink = load(buffers["sinks"], head)[0]
    final = bind(tirx.max(top, sink))
    shrink = bind(tirx.exp(top - final))
    denominator = bind(total * shrink + tirx.exp(sink - final))
    return bind(tirx.Select(total > 0, shrink / denominator, f32(0.0)))


def reference(call: KernelCall, *arrays: Any) -> Any:
    """The result in float64 NumPy."""
    from llmc.dialect.paged import attend_reference

    attrs = {name: value for name, value in call.attrs if name != "sinks"}
    return attend_reference(*arrays, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """``context``: the positions that each of the b sequences holds; all of them are read once and multiplied by every row."""
    n, hq, d = call.args[0].bind(symbols)
    dv, context = int(call.attr("v_dim")), symbols.get("context", 1)
    values = d + dv
    cache = symbols["b"] * context * int(call.args[1].shape[1]) * slot_bytes(call, call.args[1], d, dv)
    return cache + WIDTH[call.args[0].dtype] * n * hq * values, 2 * n * hq * values * context
