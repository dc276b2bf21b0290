"""How the wgmma linears that split k over a cluster end: sums meet in shared memory, a thread finishes four neighbouring outputs.

Every block of a cluster leaves its float32 sums of the whole tile in its shared memory and finishes a share of the tile's rows from
those of all, always added in the same order (split-K in one launch: no workspace, no counters). Where a block's memory has room for
them beside the pipeline, sums are sent to the block that finishes them.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper, linear_call
from llmc.schedules.protocol import KernelCall

Expr = Any
VECTOR = 4
"""Outputs that a thread finishes at once."""


HELD, MOST_TOGETHER = 64, 4
"""Sums that a thread holds at most, and items that it fetches at a time: a fetch from another block takes a microsecond."""


def pitch(outputs: int) -> int:
    """Floats from one row of sums to the next: padded, so that the lanes that write a column spread over the banks."""
    return outputs + VECTOR


class ClusterFinish:
    """The end of a linear whose block has float32 sums of a tile, ``rows`` of x by ``outputs`` of the ``results`` of a row.

    ``split`` blocks of a cluster of ``cluster`` share the tile, each with a part of k; a gated linear has two sides. A result is
    act(sum · scale + bias) (· other side) + residual; scales [results · sides] where ``scaled``, bias and residual where the call
    has them. ``room``: bytes of shared memory that a block has left. If they are enough, blocks are ``sent`` the sums that they
    finish, and leave when they are done; else they fetch them, and no block may leave before the last one has.

    ``received``: shape of the shared float32 array for what is sent; ``registers``: of a thread, uint32. :meth:`finish` takes None
    for both where nothing is. Device code: :meth:`arrive` before the block does anything else, :meth:`finish` at the end.
    """

    def __init__(
        self, call: KernelCall, *, results: int, outputs: int, rows: int, split: int, cluster: int, threads: int, room: int,
        scaled: bool = False,
    ) -> None:  # fmt: skip
        activation, gated = linear_call.activation(call)
        sides, pieces = 1 + gated, outputs // VECTOR
        together = max(1, min(MOST_TOGETHER, HELD // (split * sides * VECTOR), -(-rows * pieces // (split * threads))))
        has_bias, has_residual = bool(call.attr("bias")), bool(call.attr("residual"))
        dtype, out_dtype = call.args[0].dtype, call.result.dtype
        to_pair = hopper.packed_convert(dtype)
        residual_dtype = call.args[-1].dtype if has_residual else dtype
        # Whole pieces are read and stored at once, if every row of the result starts at a multiple of their size.
        paired = results % VECTOR == 0 and out_dtype == dtype
        paired_residual = has_residual and results % VECTOR == 0 and residual_dtype == dtype
        self.received = (split, sides, -(-rows // split), pitch(outputs))
        self.sent = sent = split > 1 and 4 * math.prod(self.received) <= room
        self.registers = together * 2
        own = -(-rows * pieces // threads)

        @T.inline
        def arrive() -> None:
            """Say that the block is there, and may be sent to."""
            if sent:
                T.ptx["barrier.cluster.arrive.release.aligned"]()

        @T.inline
        def send(sums: Expr, received: Expr, thread: Expr, part: Expr, first_rank: Expr, share: Expr, filled: Expr) -> None:
            """Every row of the block's ``sums`` to ``received[part]`` of the block that finishes it."""
            held = T.alloc_local((own * VECTOR,), "float32")
            address = T.alloc_local((1,), "uint32")
            for side in T.unroll(sides):
                for i in T.unroll(own):
                    item = T.meta_var(T.min(thread + i * threads, rows * pieces - 1))
                    T.ptx["ld.shared.v4.f32"](
                        held[i * VECTOR], held[i * VECTOR + 1], held[i * VECTOR + 2], held[i * VECTOR + 3],
                        sums.ptr_to([side, item // pieces, item % pieces * VECTOR]),
                    )  # fmt: skip
                for i in T.unroll(own):
                    line: T.int32 = (thread + i * threads) // pieces
                    if line < filled:
                        owner: T.int32 = line // share
                        inside = T.meta_var((thread + i * threads) % pieces * VECTOR)
                        T.ptx.mapa.shared__cluster.u32(
                            address[0],
                            T.cuda.cvta_generic_to_shared(received.ptr_to([part, side, line - owner * share, inside])),
                            T.cast(first_rank + owner, "uint32"),
                        )
                        T.ptx["st.shared::cluster.v4.f32"](
                            address[0], held[i * VECTOR], held[i * VECTOR + 1], held[i * VECTOR + 2], held[i * VECTOR + 3]
                        )

        @T.inline
        def fetch_residual(
            added: Expr, first_item: Expr, items: Expr, start: Expr, first_row: Expr, first_output: Expr, residual: Expr
        ) -> None:  # fmt: skip
            """The residuals of the items from ``first_item`` on; those behind the last item repeat it."""
            for t in T.unroll(together):
                item = T.meta_var(T.min(first_item + t * threads, items - 1))
                row = T.meta_var(T.cast(first_row + (start + item // pieces), "int64"))
                inside = T.meta_var(item % pieces * VECTOR)
                if paired_residual:
                    T.ptx["ld.global.v2.b32"](
                        added[t * 2], added[t * 2 + 1], residual.ptr_to([row, T.min(first_output + inside, results - VECTOR)])
                    )

        @T.inline
        def complete(
            sums: Expr, thread: Expr, part: Expr, first_rank: Expr, first_row: Expr, first_output: Expr, n: Expr, scales: Expr,
            bias: Expr, residual: Expr, out: Expr, held: Expr,
        ) -> None:  # fmt: skip
            fetched = T.alloc_local((together * split * sides * VECTOR,), "float32")
            added = T.alloc_local((together * 2,), "uint32")
            residuals = T.meta_var(held if sent else added)
            total = T.alloc_local((sides * VECTOR,), "float32")
            gate = T.alloc_local((2,), "float32")
            pair = T.alloc_local((2,), "uint32")
            remote = T.alloc_local((1,), "uint32")
            filled: T.int32 = T.min(n - first_row, rows)
            share: T.int32 = (filled + (split - 1)) // split
            items: T.int32 = T.min(filled - part * share, share) * pieces
            first_item: T.int32 = thread
            while first_item < items:
                # Loads of several items are under way together; those behind the last item repeat it.
                for t in T.unroll(together):
                    item = T.meta_var(T.min(first_item + t * threads, items - 1))
                    line = T.meta_var(part * share + item // pieces)
                    inside = T.meta_var(item % pieces * VECTOR)
                    if paired_residual and not sent:
                        T.ptx["ld.global.v2.b32"](
                            added[t * 2], added[t * 2 + 1],
                            residual.ptr_to([T.cast(first_row + line, "int64"), T.min(first_output + inside, results - VECTOR)]),
                        )  # fmt: skip
                    for side in T.unroll(sides):
                        for p in T.unroll(split):
                            base = T.meta_var(((t * sides + side) * split + p) * VECTOR)
                            if sent:
                                T.ptx["ld.shared.v4.f32"](
                                    fetched[base], fetched[base + 1], fetched[base + 2], fetched[base + 3],
                                    sums.ptr_to([p, side, line - part * share, inside]),
                                )  # fmt: skip
                            elif split > 1:
                                T.ptx.mapa.shared__cluster.u32(
                                    remote[0], T.cuda.cvta_generic_to_shared(sums.ptr_to([side, line, inside])),
                                    T.cast(first_rank + p, "uint32"),
                                )  # fmt: skip
                                T.ptx["ld.shared::cluster.v4.f32"](
                                    fetched[base], fetched[base + 1], fetched[base + 2], fetched[base + 3], remote[0]
                                )
                            else:
                                T.ptx["ld.shared.v4.f32"](
                                    fetched[base], fetched[base + 1], fetched[base + 2], fetched[base + 3],
                                    sums.ptr_to([side, line, inside]),
                                )  # fmt: skip
                for t in T.unroll(together):
                    item = T.meta_var(first_item + t * threads)
                    row = T.meta_var(T.cast(first_row + part * share + item // pieces, "int64"))
                    output: T.int32 = first_output + item % pieces * VECTOR
                    if item < items and output < results:
                        for e in T.unroll(VECTOR):
                            column = T.meta_var(T.min(output + e, results - 1))
                            for side in T.unroll(sides):
                                j = T.meta_var(side * VECTOR + e)
                                base = T.meta_var((t * sides + side) * split * VECTOR + e)
                                total[j] = fetched[base]
                                for p in T.unroll(split - 1):
                                    total[j] = total[j] + fetched[base + (p + 1) * VECTOR]
                                if scaled:
                                    total[j] = total[j] * T.cast(scales[side * results + column], "float32")
                                if has_bias:
                                    total[j] = total[j] + T.cast(bias[side * results + column], "float32")
                            hopper.activate(activation, total, e, gate)
                            if gated:
                                total[e] = total[e] * total[VECTOR + e]
                            if paired_residual:
                                half = T.meta_var(
                                    T.cast(T.shift_right(residuals[t * 2 + e // 2], T.uint32(16 * (e % 2))), "uint16")
                                )
                                total[e] = total[e] + T.cast(T.reinterpret(dtype, half), "float32")
                            elif has_residual:
                                total[e] = total[e] + T.cast(residual[row, column], "float32")
                        if paired:
                            for e in T.unroll(2):
                                T.ptx[to_pair](pair[e], total[e * 2 + 1], total[e * 2])
                            T.ptx["st.global.v2.b32"](out.ptr_to([row, output]), pair[0], pair[1])
                        else:
                            for e in T.unroll(VECTOR):
                                if output + e < results:
                                    out[row, output + e] = T.cast(total[e], out_dtype)
                first_item = first_item + together * threads
                if sent and first_item < items:
                    fetch_residual(held, first_item, items, part * share, first_row, first_output, residual)

        @T.inline
        def finish(
            sums: Expr, received: Expr, held: Expr, thread: Expr, part: Expr, first_rank: Expr, first_row: Expr, first_output: Expr,
            n: Expr, scales: Expr, bias: Expr, residual: Expr, out: Expr,
        ) -> None:  # fmt: skip
            """Store the tile's results in ``out`` [n, results], this block's share: it is number ``part`` of those from rank
            ``first_rank`` on. ``sums``: shared [sides, rows, pitch(outputs)] of the whole tile, which threads have just written."""
            if sent:
                T.cuda.cta_sync()
                T.ptx["barrier.cluster.wait.acquire.aligned"]()
                filled: T.int32 = T.min(n - first_row, rows)
                share: T.int32 = (filled + (split - 1)) // split
                items: T.int32 = T.min(filled - part * share, share) * pieces
                if thread < items:
                    fetch_residual(held, thread, items, part * share, first_row, first_output, residual)
                send(sums, received, thread, part, first_rank, share, filled)
                T.ptx["barrier.cluster.arrive.release.aligned"]()
                T.ptx["barrier.cluster.wait.acquire.aligned"]()
                complete(received, thread, part, first_rank, first_row, first_output, n, scales, bias, residual, out, held)
            else:
                if cluster > 1:
                    T.cuda.cluster_sync()
                else:
                    T.cuda.cta_sync()
                complete(sums, thread, part, first_rank, first_row, first_output, n, scales, bias, residual, out, held)
                if cluster > 1:
                    T.cuda.cluster_sync()

        self.arrive, self.finish = arrive, finish
