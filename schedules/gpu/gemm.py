"""``llmc.linear`` on any GPU, every shape and dtype, for many rows: float32 multiply-adds through shared memory.

A thread block computes a tile of the result; its operands pass through shared memory in float32, transposed, ``K_STEP`` columns
at a time; a thread keeps a square of results in registers (Volkov & Demmel, 2008, "Benchmarking GPUs to tune dense linear
algebra"). It takes what no matrix instruction does: float32 matrices, mixed dtypes, odd shapes. The order of additions does not
depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import linear_call
from llmc.schedules.gpu.emit import (
    Symbols,
    arguments,
    bind,
    ceildiv,
    common_lanes,
    f32,
    function,
    i64,
    launch,
    load,
    registers,
    shared,
    store,
    sync,
    when,
)
from llmc.schedules.gpu.linear_call import make_call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.gemm"
OP = linear_call.OP
K_STEP = 16
PAD = 4
"""Floats between the rows of a transposed tile, against bank conflicts of its stores."""

SHAPES: dict[str, KernelCall] = {
    "square_4096": make_call(4096, 4096, "bfloat16"),
    "extend_72x40": make_call(72, 40),
    "extend_130x37": make_call(130, 37, "bfloat16", bias=1, residual=1, activation="gelu_tanh"),
    "extend_5x16_mixed": make_call(5, 16, "float16", "float32", activation="relu", out="float32"),
    "extend_66x1": make_call(66, 1, activation="relu2", bias=1),
    "extend_136x64_silu": make_call(136, 64, "float16", activation="silu", bias=1, residual=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    return "float32 multiply-adds, tiles in shared memory" if linear_call.takes(call, target) else None


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``tile``: rows and outputs of a thread block, and rows (as many outputs) of one thread."""
    assert isinstance(target, GpuTarget)
    tiles = [(64, 64, 4), (128, 64, 4), (32, 64, 4), (128, 128, 8), (128, 64, 8), (64, 64, 8), (32, 64, 8)]
    return {"tile": [tile for tile in tiles if tile[0] * tile[1] // tile[2] ** 2 <= target.max_threads]}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    o, k = (int(d) for d in call.args[1].shape)
    specs = dict(zip(linear_call.operand_names(call), (*call.args, call.result), strict=True))
    with function(f"gemm_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        _Gemm(call, target, buffers, symbols.dim(call.args[0].shape[0]), config).emit()
    return done()


class _Gemm:
    def __init__(self, call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], n: Expr, config: dict[str, Any]) -> None:
        self.call, self.target, self.buffers, self.n = call, target, buffers, n
        self.o, self.k = (int(d) for d in call.args[1].shape)
        self.rows, self.columns, self.square = config["tile"]
        self.threads = self.rows * self.columns // self.square**2

    def emit(self) -> None:
        down_count, square = self.rows // self.square, self.square
        with launch(-(-self.o // self.columns), self.threads, ceildiv(self.n, self.rows)) as (thread, column_block, row_block):
            x_tile, w_tile = shared(K_STEP * (self.rows + PAD)), shared(K_STEP * (self.columns + PAD))
            first_row, first_output = bind(row_block * self.rows), bind(column_block * self.columns)
            down, across = bind(tirx.floormod(thread, down_count)), bind(tirx.floordiv(thread, down_count))
            sums = registers(square * square, start=0.0)
            with T.serial(0, -(-self.k // K_STEP)) as step:
                start = bind(i64(step) * K_STEP)
                self._fetch(x_tile, "x", self.rows, first_row, self.n, thread, start)
                self._fetch(w_tile, "weight", self.columns, first_output, i64(self.o), thread, start)
                sync()
                with T.serial(0, K_STEP) as kk:
                    xs = self._slice(x_tile, kk * (self.rows + PAD) + down * square)
                    ws = self._slice(w_tile, kk * (self.columns + PAD) + across * square)
                    for i, x in enumerate(xs):
                        for j, w in enumerate(ws):
                            store(sums, sums[i * square + j] + x * w, i * square + j)
                sync()
            lanes = common_lanes(self.target, [s.dtype for s in (*self.call.args[2:], self.call.result)], square, self.o)
            for i in range(square):
                row = bind(first_row + i64(down) * square + i)
                for j in range(0, square, lanes):
                    output = bind(first_output + i64(across) * square + j)

                    def finish(row: Expr = row, output: Expr = output, at: int = i * square + j) -> None:
                        totals = [sums[at + lane] for lane in range(lanes)]
                        linear_call.finish(self.call, self.buffers, totals, row, output)

                    when(tirx.all(row < self.n, output < self.o), finish)

    def _slice(self, tile: Expr, at: Expr) -> list[Expr]:
        lanes = min(self.square, 4, self.target.max_lanes)
        return [bind(v) for i in range(0, self.square, lanes) for v in load(tile, at + i, lanes=lanes)]

    def _fetch(self, tile: Expr, name: str, lines: int, first: Expr, count: Expr, thread: Expr, start: Expr) -> None:
        """``lines`` rows of ``K_STEP`` columns of an operand, transposed into the tile; zero beyond the edges."""
        source = self.buffers[name]
        lanes = common_lanes(self.target, [str(source.ty.dtype)], self.k, K_STEP)
        per_line = K_STEP // lanes
        pieces = lines * per_line
        for step in range(-(-pieces // self.threads)):
            item = bind(thread + step * self.threads)
            line, at = bind(tirx.floordiv(item, per_line)), bind(tirx.floormod(item, per_line) * lanes)

            def fetch(line: Expr = line, at: Expr = at) -> None:
                row, column = bind(first + i64(line)), bind(start + i64(at))
                inside = tirx.all(row < count, column < self.k)
                # Loads stay in range where nothing is used: TVM may load ahead of a test.
                values = load(source, tirx.min(row, count - 1), tirx.min(column, self.k - lanes), lanes=lanes)
                for i, value in enumerate(values):
                    store(tile, tirx.Select(inside, value, f32(0.0)), (at + i) * (lines + PAD) + line)

            if (step + 1) * self.threads <= pieces:
                fetch()
            else:
                when(item < pieces, fetch)


reference, roofline = linear_call.reference, linear_call.roofline
