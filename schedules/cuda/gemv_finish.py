"""How the decode linears end: partial sums meet in shared memory, and a thread finishes and stores each result.

What a result needs besides its sums is fetched to registers beforehand: scales and bias, which nothing computes, before the kernel
waits for the one before it, the residual right after. None of them is in a cache close by, and at the end everyone would wait.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import linear_call
from llmc.schedules.cuda.input_norm import InputNorm
from llmc.schedules.cuda.math import activate
from llmc.schedules.cuda.quantized_codes import LIFT
from llmc.schedules.protocol import KernelCall

Expr = Any
LOAD = {"float32": "ld.global.f32", "float16": "ld.global.b16", "bfloat16": "ld.global.b16"}


class Finish:
    """The end of a linear whose ``threads`` threads finish ``tiles`` tiles of m16n8 accumulators, ``column_tiles`` wide.

    ``results``: of a row. ``sources``: accumulators over parts of k that are added up for a tile, in order. A gated linear has two
    sides, gate and factor: two tiles next to each other, or, ``paired``, the upper and the lower 8 rows of one. ``scale_dtype``:
    where sums are multiplied by a scale for each row of the weight, how it is stored. ``norm``: with its slot behind the others,
    sums are scaled by the inverse of the row's root mean square. ``lifted``: sums are 2^-60 times what they stand for
    (:func:`.quantized_codes.lifted`); their scale makes up for it. A result is act(sum · scale + bias) (· factor) + residual.

    The methods are for device code. ``thread``: of those that finish; ``first``: the first result of the first tile; ``first_row``
    and ``rows``: rows of x from which on and how many. Partial sums: shared float32 [.., slots, column_tiles, 32, 4], where a slot
    is a tile of 16 rows. Registers: ``sided`` of scales and of biases, ``items`` of residuals, of the types :meth:`register` says.
    """

    def __init__(
        self, call: KernelCall, results: int, tiles: int, column_tiles: int, norm: InputNorm, *, sources: int, threads: int,
        paired: bool = False, scale_dtype: str = "", lifted: bool = False,
    ) -> None:  # fmt: skip
        activation, gated = linear_call.activation(call)
        sides, height, columns = 1 + gated, 8 if paired else 16, 8 * column_tiles
        slots = tiles if paired else tiles * sides
        outputs = height * tiles
        count = outputs * columns
        k = int(call.args[0].shape[1])
        has_bias, has_residual, has_scale = bool(call.attr("bias")), bool(call.attr("residual")), bool(scale_dtype)
        named = [name for name in ("bias", "residual") if call.attr(name)]
        dtypes = {name: spec.dtype for name, spec in zip(reversed(named), reversed(call.args), strict=False)}
        out_dtype = call.result.dtype
        self.items = items = -(-count // threads)
        self.sided = items * sides

        def value(held: Expr, at: Expr, dtype: str) -> Expr:
            return held[at] if dtype == "float32" else T.cast(T.reinterpret(dtype, held[at]), "float32")

        def scale_of(held: Expr, at: Expr) -> Expr:
            scale = value(held, at, scale_dtype)
            return scale * T.float32(2.0**LIFT) if lifted else scale

        def output_of(item: Expr, first: Expr) -> Expr:
            """Neighbouring threads finish neighbouring results of a row: their stores coalesce."""
            return first + item // height % tiles * height + item % height

        def fetcher(dtype: str) -> Any:
            load = LOAD[dtype]

            @T.inline
            def fetch(held: Expr, source: Expr, thread: Expr, first: Expr) -> None:
                for i in T.unroll(items):
                    output = T.meta_var(output_of(thread + i * threads, first))
                    if thread + i * threads < count and output < results:
                        for side in T.unroll(sides):
                            T.ptx[load](held[i * sides + side], source.ptr_to([output + side * results]))

            return fetch

        @T.inline
        def nothing(held: Expr, source: Expr, thread: Expr, first: Expr) -> None:
            pass

        residual_load = LOAD[dtypes.get("residual", "float32")]

        @T.inline
        def fetch_residual(held: Expr, residual: Expr, thread: Expr, first: Expr, first_row: Expr, rows: Expr) -> None:
            if has_residual:
                for i in T.unroll(items):
                    row = T.meta_var((thread + i * threads) // outputs)
                    output = T.meta_var(output_of(thread + i * threads, first))
                    if row < rows and output < results:
                        T.ptx[residual_load](held[i], residual.ptr_to([T.cast(first_row + row, "int64"), output]))

        @T.inline
        def store(partial: Expr, source: Expr, acc: Expr, lane: Expr) -> None:
            """A warp's accumulators [(slots + norm.accumulated) · column_tiles · 4] to ``partial[source]``."""
            for r in T.unroll(slots + norm.accumulated):
                for c in T.unroll(column_tiles):
                    for i in T.unroll(4):
                        partial[source, r, c, lane, i] = acc[(r * column_tiles + c) * 4 + i]

        @T.inline
        def finish(
            partial: Expr, source: Expr, thread: Expr, first: Expr, first_row: Expr, rows: Expr, scales: Expr, biases: Expr,
            residuals: Expr, out: Expr,
        ) -> None:  # fmt: skip
            """Add up the sources from index ``source`` on, and store the results in ``out`` [n, results]."""
            for i in T.unroll(items):
                item: T.int32 = thread + i * threads
                inside: T.int32 = item % height
                tile: T.int32 = item // height % tiles
                row: T.int32 = item // outputs
                output: T.int32 = first + tile * height + inside
                if row < rows and output < results:
                    # The accumulator fragment: lane (inside % 8) * 4 + row % 8 / 2 holds rows 2i and 2i + 1 of outputs g and g + 8.
                    owner: T.int32 = inside % 8 * 4 + row % 8 // 2
                    slot: T.int32 = inside // 8 * 2 + row % 2
                    total: T.float32 = T.float32(0)
                    factor: T.float32 = T.float32(0)
                    for s in T.unroll(sources):
                        if gated and not paired:
                            total = total + partial[source + s, tile * 2, row // 8, owner, slot]
                            factor = factor + partial[source + s, tile * 2 + 1, row // 8, owner, slot]
                        else:
                            total = total + partial[source + s, tile, row // 8, owner, slot]
                            if paired:
                                factor = factor + partial[source + s, tile, row // 8, owner, slot + 2]
                    if norm.here:
                        squares: T.float32 = T.float32(0)
                        for s in T.unroll(sources):
                            # The diagonal: row r of the rows' products is with the lanes 4 r .. 4 r + 3, a pair of columns each.
                            squares = squares + partial[source + s, slots, row // 8, row % 8 * 4 + row % 8 // 2, row % 2]
                        T.ptx["rsqrt.approx.ftz.f32"](squares, squares * T.float32(1.0 / k) + T.float32(norm.eps))
                        total = total * squares
                        if gated:
                            factor = factor * squares
                    if has_scale:
                        total = total * scale_of(scales, i * sides)
                        if gated:
                            factor = factor * scale_of(scales, i * sides + 1)
                    if has_bias:
                        total = total + value(biases, i * sides, dtypes["bias"])
                        if gated:
                            factor = factor + value(biases, i * sides + 1, dtypes["bias"])
                    total = activate(activation, total)
                    if gated:
                        total = total * factor
                    if has_residual:
                        total = total + value(residuals, i, dtypes["residual"])
                    out[T.cast(first_row + row, "int64"), output] = T.cast(total, out_dtype)

        # ``(held, source, thread, first)``: each thread's scales [results · sides or more] and biases, any time in the kernel.
        self.fetch_scales = fetcher(scale_dtype) if has_scale else nothing
        self.fetch_bias = fetcher(dtypes["bias"]) if has_bias else nothing
        # ``(held, residual, thread, first, first_row, rows)``: residuals [n, results], once the kernel before is done.
        self.fetch_residual = fetch_residual
        self.store, self.finish = store, finish

    @staticmethod
    def register(dtype: str) -> str:
        """The type of a register that holds a value stored as ``dtype``."""
        return "float32" if dtype == "float32" else "uint16"
