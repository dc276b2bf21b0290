"""Tiles of :mod:`.prefill_kernel`: how large they are, which sequence has the i-th one, and the way of its result to memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper

LOAD_ROWS = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"


class Shape(NamedTuple):
    """``rows`` of a tile (64 or 128); ``keys``: positions of a tile of keys; ``share``: blocks of a cluster that share them (1 or
    2)."""

    rows: int
    keys: int
    share: int


class Choices(NamedTuple):
    """``stages``: tiles of keys, and of values, in shared memory; ``blocks``: of the grid for tiles of 128 rows, twice as many for
    64; ``lazy``: rescale sums only when they must be; ``turns``: two warpgroups issue their multiplications in turns.
    """

    stages: int
    blocks: int
    lazy: bool
    turns: bool
    dependent_launch: bool


def packed_heads(group: int, rows: int) -> int:
    """How many of the ``group`` query heads of a KV head share a tile: the most, up to 16, that leave few of its rows empty."""
    return max(h for h in range(1, 17) if group % h == 0 and rows // h * h >= rows * 15 // 16)


@T.inline
def find(found: Any, wanted: Any, q_indptr: Any, batch: Any, span: Any, lane: Any) -> None:
    """found[0] = the sequence that has tile ``wanted`` of ``span`` tokens, ``batch`` if there are not so many tiles; found[1] =
    which of its tiles. A whole warp counts, 32 sequences at a time.
    """
    found[0] = batch
    found[1] = 0
    tiles_before: T.int32 = 0
    candidate: T.int32 = 0
    while candidate < batch:
        tiles: T.int32 = 0
        if candidate + lane < batch:
            tiles = (q_indptr[candidate + lane + 1] - q_indptr[candidate + lane] + (span - 1)) // span
        end: T.int32 = tiles
        for i in T.unroll(5):
            lower: T.int32 = hopper.shuffle(end, T.max(lane - (1 << i), 0))
            if lane >= (1 << i):
                end = end + lower
        passed: T.int32 = T.cast(tiles_before + end <= wanted, "int32")
        for i in T.unroll(5):
            passed = passed + hopper.exchange(passed, 1 << i)
        if passed < 32:
            found[0] = candidate + passed
            found[1] = wanted - tiles_before - hopper.shuffle(end - tiles, passed)
            candidate = batch
        else:
            tiles_before = tiles_before + hopper.shuffle(end, 31)
            candidate = candidate + 32


@T.inline
def load_queries(held: Any, s_q: Any, first_row: Any, d: Any, lane: Any) -> None:
    """16 rows of a swizzled tile as the A operand: lane l gives the address of row l % 16 and of one of two pieces of 8 columns."""
    for kk in T.unroll(d // 16):
        T.ptx[LOAD_ROWS](
            held[kk * 4], held[kk * 4 + 1], held[kk * 4 + 2], held[kk * 4 + 3],
            s_q.ptr_to([kk // 4, first_row + lane % 16, ((kk % 4 * 2 + lane // 16) ^ (lane % 8)) * 8]),
        )  # fmt: skip


@T.inline
def store(
    out: Any, o: Any, total: Any, p: Any, to_pair: Any, first_row: Any, left: Any, first_head: Any, own_row: Any, packed: Any,
    tokens: Any, d: Any, lane: Any,
) -> None:  # fmt: skip
    """The thread's sums ``o`` times ``total`` of their rows to ``out [n, hq, d]``. ``own_row`` of the tile and 8 more are its rows;
    a row is a token's head, of ``left`` tokens from ``first_row`` on. ``p``: four registers of scratch.
    """
    for r in T.unroll(2):
        token: T.int32 = (own_row + 8 * r) // packed
        to_row = T.meta_var(T.cast(first_row + token, "int64"))
        head = T.meta_var(first_head + (own_row + 8 * r) % packed)
        for i in T.unroll(d // 16):
            for half in T.unroll(2):
                T.ptx[to_pair](p[half], o[i * 8 + half * 4 + r * 2 + 1] * total[r], o[i * 8 + half * 4 + r * 2] * total[r])
            # Neighbours trade a pair of columns, so that each has four of one of two pieces: a store fills 32 bytes of a row.
            p[2] = hopper.exchange(T.if_then_else(lane % 2 == 0, p[1], p[0]), 1)
            p[3] = T.if_then_else(lane % 2 == 0, p[0], p[2])
            p[2] = T.if_then_else(lane % 2 == 0, p[2], p[1])
            if token < tokens and token < left:
                T.ptx["st.global.v2.b32"](out.ptr_to([to_row, head, i * 16 + lane % 2 * 8 + lane % 4 // 2 * 4]), p[3], p[2])
