"""How the decode linears end: the warps' partial sums meet in shared memory, and a thread finishes and stores each result."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda.math import activate
from llmc.schedules.protocol import KernelCall

Expr = Any


def finisher(
    call: KernelCall, *, o: int, warps: int, tiles: int, column_tiles: int, out_dtype: str, scaled: bool = False
) -> Any:
    """``finish(partial, acc, thread, first, first_row, rows, scales, bias, residual, out)`` for a block of ``warps`` warps.

    ``acc``: each warp's m16n8 accumulators [tiles · column_tiles · 4] over its share of k; ``partial``: shared float32 [warps, tiles,
    column_tiles, 32, 4]. The block has the outputs from ``first`` and ``rows`` rows of x from ``first_row``. Stores act(sum · scale +
    bias) + residual; ``scales`` [o or more] where ``scaled``, bias and residual where the call has them.
    """
    outputs, columns, threads = 16 * tiles, 8 * column_tiles, 32 * warps
    has_bias, has_residual, activation = bool(call.attr("bias")), bool(call.attr("residual")), call.attr("activation")

    @T.inline
    def finish(
        partial: Expr, acc: Expr, thread: Expr, first: Expr, first_row: Expr, rows: Expr, scales: Expr, bias: Expr, residual: Expr,
        out: Expr,
    ) -> None:  # fmt: skip
        for r in T.unroll(tiles):
            for c in T.unroll(column_tiles):
                for i in T.unroll(4):
                    partial[thread // 32, r, c, thread % 32, i] = acc[(r * column_tiles + c) * 4 + i]
        T.cuda.cta_sync()
        # Neighbouring threads finish neighbouring outputs of a row: their stores coalesce.
        item: T.int32 = thread
        while item < outputs * columns:
            inside: T.int32 = item % 16
            tile: T.int32 = item // 16 % tiles
            row: T.int32 = item // outputs
            output: T.int32 = first + tile * 16 + inside
            if row < rows and output < o:
                # The accumulator fragment: lane (inside % 8) * 4 + row % 8 / 2 holds rows 2i and 2i + 1 of outputs g and g + 8.
                owner: T.int32 = inside % 8 * 4 + row % 8 // 2
                slot: T.int32 = inside // 8 * 2 + row % 2
                total: T.float32 = T.float32(0)
                for w in T.unroll(warps):
                    total = total + partial[w, tile, row // 8, owner, slot]
                if scaled:
                    total = total * T.cast(scales[output], "float32")
                if has_bias:
                    total = total + T.cast(bias[output], "float32")
                total = activate(activation, total)
                if has_residual:
                    total = total + T.cast(residual[T.cast(first_row + row, "int64"), output], "float32")
                out[T.cast(first_row + row, "int64"), output] = T.cast(total, out_dtype)
            item = item + threads

    return finish
