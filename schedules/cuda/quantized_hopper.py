"""``llmc.quantized_linear`` on sm_90a for every number of rows: one function that picks a kernel by n when it is called.

=============  ===================  =========================================================================
rows           kernel               why
=============  ===================  =========================================================================
1, 2-8         ``quantized_ring``   mma with the weights as the wide operand, where there are many of them
1, 2-8, 9-16   ``quantized_gemv``   the same with more, smaller blocks
more           ``quantized_gemm``   wgmma over tiles as wide as there are rows; k split over a cluster
=============  ===================  =========================================================================

The choice is host code: a CUDA graph records the one kernel that its size asks for. Results of one row differ between the kernels:
``quantized_gemm`` rounds a weight that has a group's scale to x's dtype, ``quantized_gemv`` multiplies codes and scales the sums.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.cuda import quantized_gemm, quantized_gemv, quantized_ring
from llmc.schedules.cuda import range_candidates as tried
from llmc.schedules.cuda.host_choice import for_rows
from llmc.schedules.gpu import quantized_call
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.parts import by_rows
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.quantized_hopper"
OP = quantized_call.OP
KERNELS = {"gemv": quantized_gemv, "ring": quantized_ring, "gemm": quantized_gemm}
BUCKETS = {"1": 1, "1-8": 8, "9-16": 16, "17-32": 32, "33-64": 64, "65-128": 128, "129-512": 512, "513-": None}
"""An axis of the configuration -> the most rows that its kernel runs for. One row is apart (:func:`buckets`) where a kernel with
room for one alone leaves memory to its neighbours; what is called 1-8 begins with two then."""

MANY_ROWS = 2048
"""What the last range is tuned for."""

SHAPES: dict[str, KernelCall] = {
    "o_4096x4096_int4_g128": make(4096, 4096, "int4_g128", residual=1),
    "gate_up_28672x4096_int4": make(28672, 4096, "int4_g32", activation="silu_gated"),
    "edges_136x328_q4_1": make(136, 328, "q4_1", bias=1, residual=1),
    "gated_160x264_int8_f16": make(160, 264, "int8", "float16", activation="silu_gated"),
    "small_64x64_fp8": make(64, 64, "fp8_e4m3", phase="extend"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if quantized_gemm.mismatch(call, target):
        return None
    return f"{call.attr('scheme')} codes to {call.args[0].dtype} tensor cores; the kernel by the number of rows: mma, wgmma"


def buckets(call: KernelCall) -> dict[str, int | None]:
    """:data:`BUCKETS` of a call: one row is apart where :mod:`.quantized_ring` takes it."""
    alone = quantized_ring.most_rows(call) > 0
    return {rows: most for rows, most in BUCKETS.items() if rows != "1" or alone}


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """For each of :func:`buckets` its kernel and that kernel's configuration; ``dependent_launch``: start early."""
    return {**{rows: candidates(call, rows) for rows in buckets(call)}, "dependent_launch": [True, False]}


def candidates(call: KernelCall, rows: str) -> list[dict[str, Any]]:
    """Configurations for a bucket, the default first. Next to where one kernel takes over from the other a bucket has both."""
    most = BUCKETS[rows]
    match rows:
        case "1" | "1-8":
            # A row alone has no use for fewer columns in quantized_gemv: the same code as for eight.
            assert most is not None
            streams, rings = tried.quantized_gemvs(call, 8), tried.quantized_rings(call, most)
            return rings + streams if quantized_ring.pays(call, most) else streams + rings
        case "9-16":
            return tried.quantized_gemvs(call, 16) + tried.quantized_gemms(call, 16)
        case "17-32":
            return tried.quantized_tens(call, 32)
    return tried.quantized_gemms(call, most or MANY_ROWS)


def parts(call: KernelCall, target: Target) -> dict[str, list[dict[str, int]]]:
    return by_rows(buckets(call), MANY_ROWS)


def build_part(call: KernelCall, target: Target, axis: str, value: dict[str, Any]) -> Any:
    return KERNELS[value["kernel"]].build(call, target, {**value, "dependent_launch": True})


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    name = f"quantized_linear_{call.attr('scheme')}_{call.attr('o')}x{call.attr('k')}"
    return for_rows(name, buckets(call), config, lambda chosen: KERNELS[chosen["kernel"]].build(call, target, chosen))


reference, roofline = quantized_call.reference, quantized_call.roofline
