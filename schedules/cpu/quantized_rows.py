"""Activations as int8: symmetric, one scale per 32 columns of k, rounded to nearest even.

For block b of a row: ``scale = max |x| / 127``, ``code = round(x / scale)``; so x = scale · code within half a scale. A kernel
reads the codes, the scales, and for weights with offsets what the sum of a stretch's codes makes of them: w = s · (c - z)
makes the product s · scale · (Σ c · code - z · Σ code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import PARALLEL_WORK, Simd, bind, ceildiv, f32, i64, read, store, vector, when
from llmc.schedules.cpu.layout_panel import BLOCK

Expr = Any
ROUND = 12582912.0
"""1.5 · 2^23: a float of magnitude below 2^22 plus this has its nearest integer in the low mantissa bits."""
ROUND_BITS = 0x4B400000


@dataclass(frozen=True)
class Rows:
    """Workspaces: ``codes`` int8 [n · columns], ``scales`` float32 [n · columns / 32], and for every stretch of columns ``starts``
    int32, ``start`` · Σ code, None for a start of 0; and ``offsets`` float32, scale · Σ code for ``offset`` ``"minimum"``, - Σ code
    for ``"zero_point"``, None for ``"none"``."""

    codes: Expr
    scales: Expr
    starts: Expr | None
    offsets: Expr | None
    columns: int
    stretch: int
    start: int
    offset: str
    together: int = 1

    def block(self, row: Expr, column: Expr) -> Expr:
        """The number of a row's block of 32 columns: row after row, or side by side the blocks of the same columns of
        ``together`` rows, a power of two."""
        count, bits = self.columns // BLOCK, self.together.bit_length() - 1
        if self.together == 1:
            return row * count + column
        return (((row >> i64(bits)) * count + column) << i64(bits)) + (row & i64(self.together - 1))


def workspace(n: Expr, columns: int, stretch: int, start: int, offset: str, together: int = 1) -> Rows:
    """Room for n rows of ``columns`` columns, a multiple of 32; ``stretch``: columns that share a sum, 16 or 32. ``together``: rows
    whose blocks lie side by side; there is room for a multiple of them."""
    n = ceildiv(n, together) * together if together > 1 else n

    def sums(dtype: str) -> Expr:
        return T.alloc_buffer((n * (columns // stretch),), dtype)

    return Rows(
        T.alloc_buffer((n * columns,), "int8"),
        T.alloc_buffer((n * (columns // BLOCK),), "float32"),
        sums("int32") if start else None,
        sums("float32") if offset != "none" else None,
        columns,
        stretch,
        start,
        offset,
        together,
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
    at = bind(rows.block(row, block))
    start = bind(at * BLOCK)
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
    if rows.starts is None and rows.offsets is None:
        return
    for s in range(sets):
        total = bind(_fold(lambda a, b: a + b, codes[s * vectors : (s + 1) * vectors]))
        _put_sum(rows, at * sets + s, bind(simd.total(total)), scale)


def _put_sum(rows: Rows, at: Expr, total: Expr, scale: Expr) -> None:
    if rows.starts is not None:
        store(rows.starts, total * tirx.const(rows.start, "int32"), at)
    if rows.offsets is not None:
        value = tirx.Cast("float32", total)
        store(rows.offsets, scale * value if rows.offset == "minimum" else f32(0.0) - value, at)


def _short_block(simd: Simd, x: Expr, row: Expr, block: Expr, rows: Rows, count: int, at: Expr, start: Expr) -> None:
    largest, sets = T.alloc_buffer((1,), "float32"), BLOCK // rows.stretch
    store(largest, f32(0.0), 0)
    for i in range(count):
        store(largest, tirx.max(read(largest, 0), _abs(simd.load(x, row, block * BLOCK + i), 1)), 0)
    scale, inverse = _scale(read(largest, 0))
    store(rows.scales, scale, at)
    for s in range(sets):
        total = tirx.const(0, "int32")
        for i in range(s * rows.stretch, (s + 1) * rows.stretch):
            code = tirx.const(0, "int32")
            if i < count:
                code = rounded(simd, simd.load(x, row, block * BLOCK + i), inverse, 1)
                total = bind(total + code)
            store(rows.codes, tirx.Cast("int8", code), start + i)
        _put_sum(rows, at * sets + s, total, scale)


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
