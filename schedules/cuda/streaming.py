"""What kernels share whose warps stream a matrix through rings of boxes: the start of their barriers, and how sums change hands.

A block takes tile after tile. Its ``warps`` that multiply split k; each leaves its sums of a tile in one of two halves of
``partial`` and goes on, while a warp of its own adds them up and finishes. ``full``: a barrier for each box of each ring; ``ready``
and ``free``: one for each half, where the warps that multiply say that it is written, and the other one that it is read, every
lane for itself.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda.gemv_finish import Finish

Expr = Any
LANES = 32


@T.inline
def start(full: Expr, ready: Expr, free: Expr, thread: Expr, boxes: Expr, warps: Expr) -> None:
    """Initialize the barriers. :func:`publish` makes that known."""
    if thread < boxes:
        T.ptx.mbarrier.init.shared.b64(full.ptr_to([thread]), T.uint32(1))
    if thread < 2:
        T.ptx.mbarrier.init.shared.b64(ready.ptr_to([thread]), T.uint32(warps * LANES))
        T.ptx.mbarrier.init.shared.b64(free.ptr_to([thread]), T.uint32(LANES))


@T.inline
def publish() -> None:
    """What the block's threads have written to shared memory, barriers too, is there for the copy engine and for one another."""
    T.ptx.fence.mbarrier_init.release.cluster()
    T.ptx.fence.proxy.async_.shared__cta()
    T.cuda.cta_sync()


class Hands:
    """``give`` for a warp that multiplies, behind each of its tiles; ``take`` for the one that finishes, once.

    ``end``: how a tile is finished; ``rows``: of the matrix in a tile; ``blocks``: between two tiles of a block.
    """

    def __init__(self, end: Finish, warps: int, rows: int, blocks: int) -> None:
        @T.inline
        def give(partial: Expr, ready: Expr, free: Expr, acc: Expr, tile: Expr, warp: Expr, lane: Expr) -> None:
            if tile >= 2:
                T.cuda.mbarrier_wait(free.ptr_to([tile % 2]), tile // 2 % 2 ^ 1)
            end.store(partial, tile % 2 * warps + warp, acc, lane)
            T.ptx.mbarrier.arrive.shared.b64(ready.ptr_to([tile % 2]), T.uint32(1))

        @T.inline
        def take(
            partial: Expr, ready: Expr, free: Expr, lane: Expr, block: Expr, count: Expr, first_row: Expr, n: Expr, scales: Expr,
            scale_regs: Expr, bias: Expr, bias_regs: Expr, residual: Expr, residual_regs: Expr, out: Expr,
        ) -> None:  # fmt: skip
            """Finish ``count`` tiles for ``n`` rows of x from ``first_row`` on."""
            done: T.int32 = 0
            while done < count:
                first: T.int32 = (block + done * blocks) * rows
                end.fetch_scales(scale_regs, scales, lane, first)
                end.fetch_bias(bias_regs, bias, lane, first)
                end.fetch_residual(residual_regs, residual, lane, first, first_row, n)
                T.cuda.mbarrier_wait(ready.ptr_to([done % 2]), done // 2 % 2)
                end.finish(partial, done % 2 * warps, lane, first, first_row, n, scale_regs, bias_regs, residual_regs, out)
                T.ptx.mbarrier.arrive.shared.b64(free.ptr_to([done % 2]), T.uint32(1))
                done = done + 1

        self.give, self.take = give, take
