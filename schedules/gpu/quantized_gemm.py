"""``llmc.quantized_linear`` on any GPU, every shape and dtype: float32 multiply-adds of dequantized weights.

The template of :mod:`.gemm`. It takes what no matrix instruction does, and in the decode phase what no GEMV does.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.gpu import gemm, quantized_call
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

NAME = "gpu.quantized_gemm"
OP = quantized_call.OP

SHAPES: dict[str, KernelCall] = {
    "extend_5x16_fp8_blocks_f32": make(5, 16, "fp8_e4m3_b128", "float32", "extend", activation="relu"),
    "extend_gated_70x96_int8": make(70, 96, "int8", phase="extend", activation="gelu_gated", residual=1),
    "extend_66x1_int3": make(66, 1, "int3_g32", "bfloat16", "extend", activation="relu2", bias=1, out="float32"),
    "decode_gated_38x64_int4": make(38, 64, "int4", activation="silu_gated", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    return "float32 multiply-adds of dequantized weights" if quantized_call.takes(call, target) else None


space = gemm.space


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    return quantized_call.build("quantized_gemm", gemm.emit, call, target, config)


reference, roofline = quantized_call.reference, quantized_call.roofline
