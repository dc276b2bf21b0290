"""``llmc.linear`` in 16-bit types on sm_90a for every number of rows: one function that picks a kernel by n when it is called.

=============  =========================  =========================================================================
rows           kernel                     why
=============  =========================  =========================================================================
1-8            ``ring_gemv``              mma with the weights as the wide operand, where there are many of them
1-8, 9-16      ``gemv``                   the same with more, smaller blocks
17-32,-64,-128 ``gemm_split``             wgmma over tiles as high as there are rows; k split over a cluster
129-256        either                     ``gemm_split`` where too few tiles for the GPU want k split
more           ``gemm_hopper``            wgmma, persistent over tiles, their width by what the last round leaves idle
=============  =========================  =========================================================================

The choice is host code: a CUDA graph records the one kernel that its size asks for. The phases share it, since a prefill's last
rows and a batch's decode step are alike. Results of one row differ between the kernels by the order of float32 additions.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.cuda import gemm_hopper, gemm_split, gemv, linear_call, ring_gemv
from llmc.schedules.cuda import range_candidates as tried
from llmc.schedules.cuda.host_choice import for_rows
from llmc.schedules.parts import by_rows
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.linear_hopper"
OP = "llmc.linear"
KERNELS = {"ring_gemv": ring_gemv, "gemv": gemv, "gemm_split": gemm_split, "gemm_hopper": gemm_hopper}
BUCKETS = {
    "1-8": 8,
    "9-16": 16,
    "17-32": 32,
    "33-64": 64,
    "65-128": 128,
    "129-256": 256,
    "257-512": 512,
    "513-1024": 1024,
    "1025-": None,
}
"""An axis of the configuration -> the most rows that its kernel runs for."""

MOST_SPLIT_ROWS = 256
MANY_ROWS = 2048
"""What the last range is tuned for."""

SHAPES: dict[str, KernelCall] = {
    "o_4096x4096": linear_call.sample(4096, 4096, residual=1),
    "gate_up_28672x4096": linear_call.sample(28672, 4096, activation="silu_gated"),
    "edges_136x328": linear_call.sample(136, 328, bias=1, residual=1),
    "gated_144x264_f16": linear_call.sample(144, 264, "float16", activation="silu_gated", phase="decode"),
    "small_64x64": linear_call.sample(64, 64, phase="decode"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if gemm_hopper.mismatch(call, target) or gemv.mismatch(call, target):
        return None
    return (
        f"{call.args[0].dtype} tensor cores, float32 sums; the kernel by the number of rows: gemv, split-K wgmma, persistent wgmma"
    )


def buckets(call: KernelCall) -> dict[str, int | None]:
    """:data:`BUCKETS`, of any call."""
    return BUCKETS


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """For each of :data:`BUCKETS` its kernel and that kernel's configuration; ``dependent_launch``: start early."""
    return {**{rows: candidates(call, rows) for rows in BUCKETS}, "dependent_launch": [True, False]}


def candidates(call: KernelCall, rows: str) -> list[dict[str, Any]]:
    """Configurations for a bucket, the default first. Next to where one kernel takes over from another a bucket has both."""
    most = BUCKETS[rows]
    match rows:
        case "1-8":
            streams, rings = tried.gemvs(call, 8), tried.rings(call, 8)
            return rings + streams if ring_gemv.pays(call) else streams + rings
        case "9-16":
            return tried.gemvs(call, 16) + tried.rings(call, 16) + tried.splits(call, 16, [16])
        case "17-32":
            return tried.splits(call, 32, [32]) + tried.gemvs(call, 32)
        case "33-64":
            return tried.splits(call, 64, [32, 64])
        case "65-128":
            return tried.splits(call, 128, [64, 128]) + tried.persistent(call, 128)
    few = most is not None and most <= MOST_SPLIT_ROWS and gemm_split.default(call, most)[1] > 1
    splits = tried.splits(call, most, [128, 256]) if most is not None and most <= 2 * MOST_SPLIT_ROWS else []
    return splits + tried.persistent(call, most) if few else tried.persistent(call, most) + splits


def parts(call: KernelCall, target: Target) -> dict[str, list[dict[str, int]]]:
    return by_rows(BUCKETS, MANY_ROWS)


def build_part(call: KernelCall, target: Target, axis: str, value: dict[str, Any]) -> Any:
    return KERNELS[value["kernel"]].build(call, target, {**value, "dependent_launch": True})


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    o, k = (int(d) for d in call.args[1].shape)
    return for_rows(f"linear_{o}x{k}", BUCKETS, config, lambda chosen: KERNELS[chosen["kernel"]].build(call, target, chosen))


reference, roofline = linear_call.reference, linear_call.roofline
