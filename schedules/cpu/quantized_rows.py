"""Activations as int8: symmetric, one scale per 32 columns of k, rounded to nearest even.

For block b of a row: ``scale = max |x| / 127``, ``code = round(x / scale)``; so x = scale · code within half a scale. A kernel
reads the codes, the scales, and for weights with offsets the sums of a block: w = s · (c - z) makes the product
s · scale · (Σ c · code - z · Σ code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import PARALLEL_WORK, Simd, bind, f32, i64, read, store, vector, when
from llmc.schedules.cpu.layout_panel import BLOCK

Expr = Any
ROUND = 12582912.0
"""1.5 · 2^23: a float of magnitude below 2^22 plus this has its nearest integer in the low mantissa bits."""
ROUND_BITS = 0x4B400000


@dataclass(frozen=True)
class Rows:
    """Workspaces: ``codes`` int8 [n · columns], ``scales`` float32 [n · columns / 32], ``sums`` int32 [n · columns / stretch]."""

    codes: Expr
    scales: Expr
    sums: Expr
    columns: int
    stretch: int


def workspace(n: Expr, columns: int, stretch: int) -> Rows:
    """Room for n rows of ``columns`` columns, a multiple of 32; ``stretch``: columns that share a sum, 16 or 32."""
    return Rows(
        T.alloc_buffer((n * columns,), "int8"),
        T.alloc_buffer((n * (columns // BLOCK),), "float32"),
        T.alloc_buffer((n * (columns // stretch),), "int32"),
        columns,
        stretch,
    )


def quantize(simd: Simd, x: Expr, n: Expr, k: int, rows: Rows) -> None:
    """Emit the quantization of x [n, k] into ``rows``: padding columns are 0. On all threads if it is worth their start."""
    blocks, whole = rows.columns // BLOCK, k // BLOCK

    def row(r: Expr) -> None:
        with T.serial(0, whole) as b:
            _block(simd, x, r, i64(b), k, rows, BLOCK)
        for b in range(whole, blocks):
            _block(simd, x, r, i64(b), k, rows, max(0, min(BLOCK, k - b * BLOCK)))

    def threads() -> None:
        with T.parallel(0, n) as r:
            row(i64(r))

    def alone() -> None:
        with T.serial(0, n) as r:
            row(i64(r))

    when(n * (8 * k) >= PARALLEL_WORK * 8, threads, alone)


def _block(simd: Simd, x: Expr, row: Expr, block: Expr, k: int, rows: Rows, count: int) -> None:
    """One block of which ``count`` columns exist: whole vectors where all do, element by element else."""
    lanes = min(simd.lanes, BLOCK)
    at = bind(row * (rows.columns // BLOCK) + block)
    start = bind(row * rows.columns + block * BLOCK)
    if count < BLOCK:
        _short_block(simd, x, row, block, rows, count, at, start)
        return
    values = [bind(simd.load(x, row, block * BLOCK + i, lanes=lanes)) for i in range(0, BLOCK, lanes)]
    scale, inverse = _scale(simd.largest(_fold(tirx.max, [_abs(v, lanes) for v in values])))
    codes = [rounded(simd, value, inverse, lanes) for value in values]
    for i, code in enumerate(codes):
        store(rows.codes, tirx.Cast(vector("int8", lanes), code), start + i * lanes, lanes=lanes)
    store(rows.scales, scale, at)
    sets, vectors = BLOCK // rows.stretch, rows.stretch // lanes
    for s in range(sets):
        total = bind(_fold(lambda a, b: a + b, codes[s * vectors : (s + 1) * vectors]))
        store(rows.sums, simd.total(total), at * sets + s)


def _short_block(simd: Simd, x: Expr, row: Expr, block: Expr, rows: Rows, count: int, at: Expr, start: Expr) -> None:
    largest, sets = T.alloc_buffer((1,), "float32"), BLOCK // rows.stretch
    store(largest, f32(0.0), 0)
    for s in range(sets):
        store(rows.sums, tirx.const(0, "int32"), at * sets + s)
    for i in range(count):
        store(largest, tirx.max(read(largest, 0), _abs(simd.load(x, row, block * BLOCK + i), 1)), 0)
    scale, inverse = _scale(read(largest, 0))
    for i in range(BLOCK):
        code = tirx.const(0, "int32")
        if i < count:
            code = rounded(simd, simd.load(x, row, block * BLOCK + i), inverse, 1)
        store(rows.codes, tirx.Cast("int8", code), start + i)
        slot = at * sets + i // rows.stretch
        store(rows.sums, read(rows.sums, slot) + code, slot)
    store(rows.scales, scale, at)


def _scale(largest: Expr) -> tuple[Expr, Expr]:
    """The scale and its inverse; a block of zeros has scale 0 and codes 0, as has one whose scale's inverse would overflow."""
    largest = bind(largest)
    tiny = largest < f32(1e-36)
    return bind(tirx.Select(tiny, f32(0.0), largest * f32(1 / 127))), bind(
        tirx.Select(tiny, f32(0.0), f32(127.0) / tirx.max(largest, f32(1e-36)))
    )


def rounded(simd: Simd, value: Expr, inverse: Expr, lanes: int) -> Expr:
    """value · inverse (below 2^22) to the nearest int32, ties to even, without rounding the product first where there is an fma."""
    shifted = simd.fma(value, simd.splat(inverse, lanes), simd.splat(ROUND, lanes))
    bias = tirx.const(ROUND_BITS, "int32")
    return bind(tirx.reinterpret(vector("int32", lanes), shifted) - (bias if lanes == 1 else tirx.Broadcast(bias, lanes)))


def _abs(value: Expr, lanes: int) -> Expr:
    return tirx.call_llvm_pure_intrin(vector("float32", lanes), "llvm.fabs", value)


def _fold(f: Any, values: list[Expr]) -> Expr:
    result = values[0]
    for value in values[1:]:
        result = bind(f(result, value))
    return result


def reference(x: np.ndarray) -> np.ndarray:
    """What the kernels take x [n, k] for: float64 [n, k] after rounding to int8 (codes within one of the kernels' own)."""
    n, k = x.shape
    padded = np.zeros((n, -(-k // BLOCK) * BLOCK), np.float64)
    padded[:, :k] = x
    blocks = padded.reshape(n, -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes * scale).reshape(n, -1)[:, :k]
