"""``llmc.linear`` for many rows by the target's matrix instruction, whichever it is: mma, MFMA, WMMA, simdgroup matrices.

A thread block computes a tile of the result and each of its warps a part of it. ``K_STEP`` columns of both operands at a time lie
in shared memory, in two buffers: while the warps multiply one, every thread has its share of the next under way in registers.
The sums leave through shared memory, a line of fragments at a time, so that bias, activation, gate and residual meet whole
vectors of neighbouring results. The order of additions does not depend on n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import linear_call
from llmc.schedules.gpu.emit import (
    WIDTH,
    bind,
    ceildiv,
    each,
    i64,
    launch,
    load,
    read,
    registers,
    shared,
    store,
    sync,
    when,
)
from llmc.schedules.gpu.linear_call import make_call
from llmc.schedules.gpu.matrix import fragments
from llmc.schedules.gpu.operand import CHUNK, WORD, Floats, Operand, weight_line
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.gemm_matrix"
OP = linear_call.OP
K_STEP = 32
PAD_BYTES = 16
"""Between the lines of a tile, so that the lanes of a warp, each on a line of its own, meet different banks."""

STRIP = 32
"""Columns of the sums that a warp puts into shared memory at once."""

REGISTERS = 0.4
"""The share of a thread's registers for sums and operands; addresses and the next operands under way take as many."""

TILES = (
    (128, 128, 64, 64), (64, 128, 32, 32), (128, 128, 64, 32), (64, 128, 32, 64), (64, 64, 32, 32), (32, 64, 16, 32),
    (32, 64, 32, 16),
)  # fmt: skip
"""Rows and columns of a thread block, and of one of its warps."""

SHAPES: dict[str, KernelCall] = {
    "square_4096": make_call(4096, 4096, "bfloat16"),
    "even_64x96": make_call(64, 96, "float16"),
    "edges_130x72_gelu": make_call(130, 72, "bfloat16", bias=1, residual=1, activation="gelu_tanh"),
    "odd_37x41_f16": make_call(37, 41, "float16", bias=1, residual=1, out="float32"),
    "gated_72x100": make_call(72, 100, "bfloat16", bias=1, activation="silu_gated"),
    "gated_140x40_residual": make_call(140, 40, "float16", residual=1, activation="gelu_gated"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase == "decode" or not linear_call.takes(call, target) or call.args[0].dtype != call.args[1].dtype:
        return None
    return why(call, target)


def why(call: KernelCall, target: Target) -> str | None:
    """What the report says, or None if the target has no instruction for the call's activations."""
    assert isinstance(target, GpuTarget)
    dtype = call.args[0].dtype
    if target.matrix is None or not target.matrix.takes(dtype) or not space(call, target)["tile"]:
        return None
    return f"{dtype} matrix instructions of {'x'.join(map(str, target.matrix.shape))}, float32 sums"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    assert isinstance(target, GpuTarget)
    return {"tile": [tile for tile in TILES if _fits(call, target, tile)]}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    return linear_call.build("gemm_matrix", emit, call, target, config)


def emit(
    call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], weight: Operand, k: int, n: Expr, config: dict[str, Any]
) -> None:
    """See :data:`.linear_call.Emit`."""
    _Product(call, target, buffers, weight, k, n, config["tile"]).emit()


def _pitch(held: str) -> int:
    """Elements of a tile's array from line to line."""
    return (K_STEP * 2 + PAD_BYTES) // 4 if held == WORD else K_STEP + PAD_BYTES // WIDTH[held]


def _fits(call: KernelCall, target: GpuTarget, tile: Sequence[int]) -> bool:
    """Whether threads, registers and shared memory suffice, and the instruction and a gate's halves divide the tile."""
    rows, columns, warp_rows, warp_columns = tile
    how = target.matrix
    if how is None:
        return False
    m, n, k = how.shape
    warps = rows // warp_rows * (columns // warp_columns)
    sums = warp_rows * warp_columns // target.warp_size
    held = how.held_as(call.args[0].dtype)
    size = 4 if held == WORD else WIDTH[held]
    element = 2 if held == WORD else size
    parts = ((warp_rows // m, m * k), (warp_columns // n, n * k))
    operands = sum(count * max(how.width, elements // target.warp_size) for count, elements in parts)
    used = 2 * (rows + columns) * _pitch(held) * size + warps * m * _strip_pitch(warp_columns) * 4
    return (
        warps * target.warp_size <= target.max_threads
        and sums + operands * element // 4 <= REGISTERS * target.vector_registers
        and used <= target.shared_arrays
        and warp_rows % m == 0
        and warp_columns % (2 * n) == 0
    )


def _strip_pitch(warp_columns: int) -> int:
    return min(STRIP, warp_columns) + 4


class _Product:
    def __init__(
        self,
        call: KernelCall,
        target: GpuTarget,
        buffers: dict[str, Expr],
        weight: Operand,
        k: int,
        n: Expr,
        tile: Sequence[int],
    ) -> None:
        assert target.matrix is not None
        self.call, self.target, self.buffers, self.k, self.n = call, target, buffers, k, n
        self.rows, self.columns, self.warp_rows, self.warp_columns = tile
        self.across = self.columns // self.warp_columns
        self.threads = self.rows // self.warp_rows * self.across * target.warp_size
        self.dtype = call.args[0].dtype
        self.held = target.matrix.held_as(self.dtype)
        self.pitch, self.per_chunk = _pitch(self.held), CHUNK // 2 if self.held == WORD else CHUNK
        self.results, self.gated = int(call.result.shape[1]), linear_call.activation(call)[1]
        self.x, self.weight = Floats(target, buffers["x"], k, padded=k % K_STEP != 0), weight

    def emit(self) -> None:
        wide, steps = self.columns // (1 + self.gated), -(-self.k // K_STEP)
        with launch(-(-self.results // wide), self.threads, ceildiv(self.n, self.rows)) as (thread, column_block, row_block):
            self.thread, self.first_row, self.first_result = thread, bind(row_block * self.rows), bind(column_block * wide)
            warp, lane = bind(tirx.floordiv(thread, self.target.warp_size)), bind(tirx.floormod(thread, self.target.warp_size))
            down, across = bind(tirx.floordiv(warp, self.across)), bind(tirx.floormod(warp, self.across))
            self.x_tile, self.w_tile = (shared(2 * lines * self.pitch, self.held) for lines in (self.rows, self.columns))
            m, n, k = self.target.matrix.shape  # type: ignore[union-attr]
            parts = fragments(self.target, self.dtype, lane, self.warp_rows // m, self.warp_columns // n)
            stages = [registers(self._share(lines) * self.per_chunk, self.held) for lines in (self.rows, self.columns)]
            self._fetch(stages, i64(0))
            self._commit(stages, 0)
            with T.serial(0, steps) as step:
                sync()
                more = step + 1 < steps
                when(more, lambda: self._fetch(stages, bind(i64(step + 1) * K_STEP)))
                now = bind(tirx.floormod(step, 2))
                for inner in range(K_STEP // k):
                    begin = inner * k // (2 if self.held == WORD else 1)
                    x_at = bind((now * self.rows + down * self.warp_rows) * self.pitch + begin)
                    w_at = bind((now * self.columns + across * self.warp_columns) * self.pitch + begin)
                    parts.multiply(self.x_tile, x_at, self.w_tile, w_at, self.pitch)
                when(more, lambda: self._commit(stages, 1 - now))
            self._finish(parts, warp, lane, down, across)

    def _share(self, lines: int) -> int:
        """The chunks of a tile that a thread brings."""
        return -(-lines * (K_STEP // CHUNK) // self.threads)

    def _chunks(self, lines: int) -> list[tuple[Expr, Expr, int]]:
        """For each chunk of this thread its line, its first column and its place among them; threads without repeat the last."""
        in_line, found = K_STEP // CHUNK, []
        for i in range(self._share(lines)):
            item = self.thread + i * self.threads
            if (i + 1) * self.threads > lines * in_line:
                item = tirx.min(item, lines * in_line - 1)
            found.append((bind(tirx.floordiv(item, in_line)), bind(tirx.floormod(item, in_line) * CHUNK), i))
        return found

    def _fetch(self, stages: list[Expr], start: Expr) -> None:
        for line, column, i in self._chunks(self.rows):
            row = bind(tirx.min(self.first_row + i64(line), self.n - 1))
            self.x.keep(stages[0], i * self.per_chunk, row, bind(start + i64(column)))
        for line, column, i in self._chunks(self.columns):
            at = weight_line(i64(line), self.warp_columns, self.first_result, self.results, self.gated)
            self.weight.keep(stages[1], i * self.per_chunk, at, bind(start + i64(column)))

    def _commit(self, stages: list[Expr], into: Expr) -> None:
        lanes = min(self.per_chunk, 4)
        for stage, tile, lines in ((stages[0], self.x_tile, self.rows), (stages[1], self.w_tile, self.columns)):
            for line, column, i in self._chunks(lines):
                begin = tirx.floordiv(column, CHUNK) * self.per_chunk
                place = bind((into * lines + line) * self.pitch + begin)
                for part in range(0, self.per_chunk, lanes):
                    store(tile, read(stage, i * self.per_chunk + part, lanes=lanes), place + part, lanes=lanes)

    def _finish(self, parts: Any, warp: Expr, lane: Expr, down: Expr, across: Expr) -> None:
        m, n, warp_size = parts.m, parts.n, self.target.warp_size
        width, pitch = min(STRIP, self.warp_columns), _strip_pitch(self.warp_columns)
        strip = shared(self.threads // warp_size * m * pitch)
        base, half = bind(warp * (m * pitch)), parts.across // 2
        outputs = width // (1 + self.gated)
        lanes = linear_call.result_lanes(self.call, self.target, min(4, outputs))
        for i in range(parts.down):
            for start in range(0, self.warp_columns, width):
                fragment = start // n
                if self.gated:
                    gates = [fragment // 2 + j for j in range(width // n // 2)]
                    columns = [*gates, *(g + half for g in gates)]
                else:
                    columns = [fragment + j for j in range(width // n)]
                sync()
                for place, j in enumerate(columns):
                    parts.spill(i, j, strip, bind(base + place * n), pitch)
                sync()
                span = self.warp_columns // (1 + self.gated)
                first = bind(self.first_result + i64(across) * span + start // (1 + self.gated))
                top = bind(self.first_row + i64(down) * self.warp_rows + i * m)

                def result(item: Expr, _: int, first: Expr = first, top: Expr = top) -> None:
                    row, at = bind(tirx.floordiv(item, outputs // lanes)), bind(tirx.floormod(item, outputs // lanes) * lanes)
                    place = bind(i64(base) + row * pitch + at)
                    totals = [bind(v) for v in load(strip, place, lanes=lanes)]
                    factors = [bind(v) for v in load(strip, place + outputs, lanes=lanes)] if self.gated else []
                    inside = tirx.all(top + row < self.n, first + at < self.results)
                    when(
                        inside,
                        lambda: linear_call.finish(self.call, self.buffers, totals, bind(top + row), bind(first + at), factors),
                    )

                each(lane, warp_size, m * outputs // lanes, result)


reference, roofline = linear_call.reference, linear_call.roofline
