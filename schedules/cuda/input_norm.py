"""The RMS norm of x inside the kernels for a few rows: what turns a linear into ``llmc.norm_linear``.

(x · inverse) · weightᵀ is inverse · (x · weightᵀ) with one ``inverse`` = 1 / sqrt(mean(x²) + eps) for each row: x is multiplied
as it is, sums are scaled at the end, and nobody waits for a row's sum of squares before that. It comes from the tensor cores as
well: a B fragment of x [k x 8 rows] is, register for register, the upper half of an A fragment of its transpose, so one
multiplication for 16 of k adds to an 8 x 8 matrix of products of rows, whose diagonal holds the sums. That matrix is one more tile
of accumulators, and meets the other warps' in shared memory as they all do. That costs quantized kernels more than the norm took
(their tensor cores are the busier the more rows of weights a byte holds), and for a row or two plain additions are fewer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.script import tirx as T

from llmc.dialect import norm_linear as dialect
from llmc.schedules.cuda import hopper
from llmc.schedules.protocol import KernelCall

OP = dialect.OP
LANES = 8
"""16-bit values of a 16-byte load."""

Expr = Any


def plain(call: KernelCall) -> KernelCall:
    """The linear of a call without its norm: x as it is. Any other call as it is."""
    if call.op != OP:
        return call
    op = dialect.linear_op(dict(call.attrs))
    return replace(call, op=op, attrs=tuple((name, value) for name, value in call.attrs if name != "eps"))


def normed(call: KernelCall, eps: float = 1e-5) -> KernelCall:
    """A linear's call with a norm of its x before it: the inverse of :func:`plain`."""
    return replace(call, op=OP, attrs=tuple(sorted({**dict(call.attrs), "eps": eps}.items())))


class InputNorm:
    """Device code of the norm for a kernel whose B fragments are ``column_tiles`` times 8 rows of x; of other calls nothing.

    ``slots``: tiles of sums that it adds behind the ``results`` that the kernel has (0 or 1), float32 [.., 32, 4] in shared memory
    as the others. ``accumulated``: how many of those are accumulators of every warp, which :meth:`add_squares` adds to; of a kernel
    that has its tensor cores and registers full (``by_rows``) none is, and :meth:`sum_rows` writes to shared memory.
    """

    def __init__(self, call: KernelCall, results: int, column_tiles: int, by_rows: bool = False) -> None:
        self.here = here = call.op == OP
        self.slots = int(here)
        self.accumulated = int(here and not by_rows)
        self.eps = float(call.attr("eps", 0.0))
        x_dtype, k = call.args[0].dtype, int(call.args[0].shape[1])
        dtype = hopper.PTX_TYPE[x_dtype]
        mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"

        @T.inline
        def add_squares(acc: Expr, x: Expr, outer: Expr, width: Expr, first: Expr, count: Expr) -> None:
            """Add the squares of ``count`` registers from ``first`` on to the accumulators; x: uint32 [.., column_tiles, width]."""
            if here and not by_rows:
                for c in T.unroll(column_tiles):
                    for p in T.unroll(count // 2):
                        b = T.meta_var((outer * column_tiles + c) * width + first + p * 2)
                        s = T.meta_var((results * column_tiles + c) * 4)
                        T.ptx[mma](
                            acc[s], acc[s + 1], acc[s + 2], acc[s + 3], x[b], T.uint32(0), x[b + 1], T.uint32(0), x[b], x[b + 1],
                            acc[s], acc[s + 1], acc[s + 2], acc[s + 3],
                        )  # fmt: skip

        @T.inline
        def sum_rows(partial: Expr, x: Expr, thread: Expr, threads: Expr, first_row: Expr, rows: Expr) -> None:
            """Each warp's part of the sums of squares of x [n, k], row by row, to its tile of ``partial`` [warps, slots, ..]."""
            if here and by_rows:
                held = T.alloc_local((-(-k // (threads * LANES)) * 4,), "uint32")
                row: T.int32 = 0
                while row < rows:
                    for u in T.unroll(-(-k // (threads * LANES))):
                        column = T.meta_var((thread + u * threads) * LANES)
                        for i in T.unroll(4):
                            held[u * 4 + i] = T.uint32(0)
                        if column < k:
                            T.ptx["ld.global.v4.b32"](
                                held[u * 4], held[u * 4 + 1], held[u * 4 + 2], held[u * 4 + 3],
                                x.ptr_to([T.cast(first_row + row, "int64"), column]),
                            )  # fmt: skip
                    total: T.float32 = T.float32(0)
                    for i in T.unroll(-(-k // (threads * LANES)) * 4):
                        for half in T.unroll(2):
                            bits = T.meta_var(T.cast(T.shift_right(held[i], T.uint32(16 * half)), "uint16"))
                            value = T.meta_var(T.cast(T.reinterpret(x_dtype, bits), "float32"))
                            total = total + value * value
                    for i in T.unroll(5):
                        total = total + hopper.exchange(total, 16 >> i)
                    if thread % 32 == 0:
                        # Where the tensor cores' matrix of products has its diagonal.
                        partial[thread // 32, results, row // 8, row % 8 * 4 + row % 8 // 2, row % 2] = total
                    row = row + 1

        self.add_squares, self.sum_rows = add_squares, sum_rows
