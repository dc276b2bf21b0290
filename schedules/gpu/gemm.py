"""``llmc.linear`` on any GPU, every shape and dtype, for many rows: float32 multiply-adds through shared memory.

A thread block computes a tile of the result; its operands pass through shared memory in float32, transposed, ``K_STEP`` columns
at a time; a thread keeps a square of results in registers (Volkov & Demmel, 2008, "Benchmarking GPUs to tune dense linear
algebra"). It takes what no matrix instruction does: float32 matrices, mixed dtypes, odd shapes. The order of additions does not
depend on n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import linear_call
from llmc.schedules.gpu.emit import (
    bind,
    ceildiv,
    each,
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
from llmc.schedules.gpu.operand import CHUNK, Floats, Operand, weight_line
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
    "gated_70x24": make_call(70, 24, bias=1, residual=1, activation="silu_gated"),
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
    return linear_call.build("gemm", emit, call, target, config)


def emit(
    call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], weight: Operand, k: int, n: Expr, config: dict[str, Any]
) -> None:
    """See :data:`.linear_call.Emit`."""
    rows, columns, square = config["tile"]
    threads, down_count = rows * columns // square**2, rows // square
    gated, results = linear_call.activation(call)[1], int(call.result.shape[1])
    wide = columns // (1 + gated)
    x = Floats(target, buffers["x"], k, padded=k % K_STEP != 0)
    with launch(-(-results // wide), threads, ceildiv(n, rows)) as (thread, column_block, row_block):
        x_tile, w_tile = shared(K_STEP * (rows + PAD)), shared(K_STEP * (columns + PAD))
        first_row, first_result = bind(row_block * rows), bind(column_block * wide)
        down, across = bind(tirx.floormod(thread, down_count)), bind(tirx.floordiv(thread, down_count))
        sums = registers(square * square, start=0.0)

        def row(line: Expr) -> Expr:
            return bind(tirx.min(first_row + line, n - 1))

        def output(line: Expr) -> Expr:
            return weight_line(line, square, first_result, results, gated)

        with T.serial(0, -(-k // K_STEP)) as step:
            start = bind(i64(step) * K_STEP)
            for operand, tile, lines, place in ((x, x_tile, rows, row), (weight, w_tile, columns, output)):
                _fetch(operand, tile, lines, place, thread, threads, start)
            sync()
            with T.serial(0, K_STEP) as kk:
                xs = _slice(target, x_tile, kk * (rows + PAD) + down * square, square)
                ws = _slice(target, w_tile, kk * (columns + PAD) + across * square, square)
                for i, a in enumerate(xs):
                    for j, b in enumerate(ws):
                        store(sums, sums[i * square + j] + a * b, i * square + j)
            sync()
        own = square // (1 + gated)
        lanes = linear_call.result_lanes(call, target, own)
        for i in range(square):
            at = bind(first_row + i64(down) * square + i)
            for j in range(0, own, lanes):
                result = bind(first_result + i64(across) * own + j)

                def finish(at: Expr = at, result: Expr = result, place: int = i * square + j) -> None:
                    totals = [sums[place + lane] for lane in range(lanes)]
                    factors = [sums[place + own + lane] for lane in range(lanes)] if gated else []
                    linear_call.finish(call, buffers, totals, at, result, factors)

                when(tirx.all(at < n, result < results), finish)


def _slice(target: GpuTarget, tile: Expr, at: Expr, square: int) -> list[Expr]:
    lanes = min(square, 4, target.max_lanes)
    return [bind(v) for i in range(0, square, lanes) for v in load(tile, at + i, lanes=lanes)]


def _fetch(
    operand: Operand, tile: Expr, lines: int, place: Callable[[Expr], Expr], thread: Expr, threads: int, start: Expr
) -> None:
    """``lines`` lines of ``K_STEP`` columns of an operand, transposed into the tile."""
    in_line = K_STEP // CHUNK

    def fetch(item: Expr, _: int) -> None:
        line, at = bind(tirx.floordiv(item, in_line)), bind(tirx.floormod(item, in_line) * CHUNK)
        for i, value in enumerate(operand.values(place(line), bind(start + at))):
            store(tile, value, (at + i) * (lines + PAD) + line)

    each(thread, threads, lines * in_line, fetch)


reference, roofline = linear_call.reference, linear_call.roofline
