"""How the decode linears end: partial sums meet in shared memory, and a thread finishes and stores each result."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import linear_call
from llmc.schedules.cuda.math import activate
from llmc.schedules.protocol import KernelCall

Expr = Any


def storer(slots: int, column_tiles: int) -> Any:
    """``store(partial, source, acc, lane)``: a warp's m16n8 accumulators [slots · column_tiles · 4] to ``partial[source]``."""

    @T.inline
    def store(partial: Expr, source: Expr, acc: Expr, lane: Expr) -> None:
        for r in T.unroll(slots):
            for c in T.unroll(column_tiles):
                for i in T.unroll(4):
                    partial[source, r, c, lane, i] = acc[(r * column_tiles + c) * 4 + i]

    return store


def finisher(
    call: KernelCall, *, results: int, sources: int, threads: int, tiles: int, column_tiles: int, out_dtype: str, scaled: bool = False
) -> Any:
    """``finish(partial, source, thread, first, first_row, rows, scales, bias, residual, out)`` by ``threads`` threads.

    They finish ``tiles`` tiles of 16 results from ``first`` on, of ``results`` in a row, and ``rows`` rows of x from
    ``first_row``. ``partial``: shared float32 [.., tiles · sides, column_tiles, 32, 4], m16n8 accumulators over parts of k, whose
    ``sources`` from index ``source`` on are added up in order; a gated linear has two sides, gate and factor, else one.
    Stores act(sum · scale + bias) (· factor) + residual; ``scales`` [results · sides or more] where ``scaled``, bias and residual
    where the call has them.
    """
    activation, gated = linear_call.activation(call)
    sides, outputs, columns = 1 + gated, 16 * tiles, 8 * column_tiles
    has_bias, has_residual = bool(call.attr("bias")), bool(call.attr("residual"))

    @T.inline
    def finish(
        partial: Expr, source: Expr, thread: Expr, first: Expr, first_row: Expr, rows: Expr, scales: Expr, bias: Expr,
        residual: Expr, out: Expr,
    ) -> None:  # fmt: skip
        # Neighbouring threads finish neighbouring outputs of a row: their stores coalesce.
        item: T.int32 = thread
        while item < outputs * columns:
            inside: T.int32 = item % 16
            tile: T.int32 = item // 16 % tiles
            row: T.int32 = item // outputs
            output: T.int32 = first + tile * 16 + inside
            if row < rows and output < results:
                # The accumulator fragment: lane (inside % 8) * 4 + row % 8 / 2 holds rows 2i and 2i + 1 of outputs g and g + 8.
                owner: T.int32 = inside % 8 * 4 + row % 8 // 2
                slot: T.int32 = inside // 8 * 2 + row % 2
                total: T.float32 = T.float32(0)
                factor: T.float32 = T.float32(0)
                for s in T.unroll(sources):
                    total = total + partial[source + s, tile * sides, row // 8, owner, slot]
                    if gated:
                        factor = factor + partial[source + s, tile * sides + 1, row // 8, owner, slot]
                if scaled:
                    total = total * T.cast(scales[output], "float32")
                    if gated:
                        factor = factor * T.cast(scales[results + output], "float32")
                if has_bias:
                    total = total + T.cast(bias[output], "float32")
                    if gated:
                        factor = factor + T.cast(bias[results + output], "float32")
                total = activate(activation, total)
                if gated:
                    total = total * factor
                if has_residual:
                    total = total + T.cast(residual[T.cast(first_row + row, "int64"), output], "float32")
                out[T.cast(first_row + row, "int64"), output] = T.cast(total, out_dtype)
            item = item + threads

    return finish
