"""One step of the online softmax that the decode attention kernels share: a warp's scores of 16 positions to weights.

Scores are the accumulators of two m16n8k16 products (PTX ISA): a lane has heads g and g + 8 of its group, and of each of the two
tiles j of 8 columns those 2 t and 2 t + 1. Which positions these are is the kernel's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.quantized_codes import as_float
from llmc.schedules.protocol import KernelCall

Expr = Any
CHUNK = 16
"""Positions of one step: the k of one mma."""

MASKED = -1e30
"""The score of a position out of sight: finite, so that a difference of two of them is no NaN."""


def softmaxer(call: KernelCall, halves: int, tiles: int, position: Callable[[Expr, int, int], Expr], codes: bool) -> Any:
    """``softmax(chunk, low, length, member, score, top, total, sums, factor, p_fragment, scales)`` for ``halves`` times 8 heads.

    ``score`` [8]: of positions ``position(member, j, e)`` of the ``chunk``, seen if they are from ``low`` to before ``length``.
    ``top`` and ``total`` [halves]: the largest score of a head so far, in units of log2, and the sum of its weights. ``sums``
    [halves · tiles · 4]: results so far, which shrink as ``top`` grows. ``p_fragment`` [halves · 2]: the weights as the B operand
    of the next product; with ``codes`` times the ``scales`` [2, 2] of the values, pairs of bfloat16. ``factor`` [1] is scratch.
    """
    scale, softcap = float(call.attr("scale")), float(call.attr("softcap"))
    to_pair = hopper.packed_convert(call.args[0].dtype)

    @T.inline
    def softmax(
        chunk: Expr, low: Expr, length: Expr, member: Expr, score: Expr, top: Expr, total: Expr, sums: Expr, factor: Expr,
        p_fragment: Expr, scales: Expr,
    ) -> None:  # fmt: skip
        for h in T.unroll(halves):
            highest: T.float32 = top[h]
            for j in T.unroll(2):
                for e in T.unroll(2):
                    at = T.meta_var(chunk * CHUNK + position(member, j, e))
                    i = T.meta_var(j * 4 + h * 2 + e)
                    if softcap > 0:
                        # tanh(x) = 2 sigmoid(2 x) - 1
                        hopper.sigmoid(factor[0], score[i] * T.float32(2 * scale / softcap))
                        score[i] = factor[0] * T.float32(2 * softcap * hopper.LOG2E) - T.float32(softcap * hopper.LOG2E)
                    else:
                        score[i] = score[i] * T.float32(scale * hopper.LOG2E)
                    score[i] = T.if_then_else(at >= low and at < length, score[i], T.float32(MASKED))
                    highest = T.max(highest, score[i])
            highest = T.max(highest, hopper.exchange(highest, 1))
            highest = T.max(highest, hopper.exchange(highest, 2))
            T.ptx["ex2.approx.ftz.f32"](factor[0], top[h] - highest)
            top[h] = highest
            total[h] = total[h] * factor[0]
            for j in T.unroll(2):
                for e in T.unroll(2):
                    T.ptx["ex2.approx.ftz.f32"](score[j * 4 + h * 2 + e], score[j * 4 + h * 2 + e] - highest)
                    total[h] = total[h] + score[j * 4 + h * 2 + e]
                if codes:
                    for e in T.unroll(2):
                        i = T.meta_var(j * 4 + h * 2 + e)
                        score[i] = score[i] * as_float(scales[2 + j], e, "bfloat16")
                T.ptx[to_pair](p_fragment[h * 2 + j], score[j * 4 + h * 2 + 1], score[j * 4 + h * 2])
            # The columns of a result tile are heads 2 t and 2 t + 1, whose factors the lanes of those rows have.
            left: T.float32 = hopper.shuffle(factor[0], member * 8)
            right: T.float32 = hopper.shuffle(factor[0], member * 8 + 4)
            for m in T.unroll(tiles):
                base = T.meta_var((h * tiles + m) * 4)
                sums[base] = sums[base] * left
                sums[base + 1] = sums[base + 1] * right
                sums[base + 2] = sums[base + 2] * left
                sums[base + 3] = sums[base + 3] * right

    return softmax
