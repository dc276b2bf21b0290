"""``llmc.quantized_linear`` for many rows by the target's matrix instruction: codes become 16-bit values before shared memory.

The template of :mod:`.gemm_matrix`; a weight is its scale times its code, rounded to the activations' dtype.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.gpu import gemm_matrix, quantized_call
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

NAME = "gpu.quantized_gemm_matrix"
OP = quantized_call.OP

SHAPES: dict[str, KernelCall] = {
    "square_4096_int4_g128": make(4096, 4096, "int4_g128", phase="extend"),
    "extend_72x40_fp8": make(72, 40, "fp8_e4m3", phase="extend"),
    "extend_130x100_q8_0_f16": make(130, 100, "q8_0", "float16", "extend", bias=1, residual=1, activation="gelu_tanh"),
    "extend_37x65_q4_1": make(37, 65, "q4_1", phase="extend"),
    "gated_72x160_int4": make(72, 160, "int4_g64", phase="extend", activation="silu_gated", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase == "decode" or not quantized_call.takes(call, target):
        return None
    found = gemm_matrix.why(call, target)
    return None if found is None else f"{call.attr('scheme')} codes to {found}"


space = gemm_matrix.space


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    return quantized_call.build("quantized_gemm_matrix", gemm_matrix.emit, call, target, config)


reference, roofline = quantized_call.reference, quantized_call.roofline
