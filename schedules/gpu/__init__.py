"""Kernel families for every GPU, in order of preference: all limits, and the matrix instruction, from the target's data."""

from llmc.schedules.gpu import (
    append,
    attend_decode,
    attend_extend,
    gemm,
    gemm_matrix,
    gemv,
    layout_mma,
    moe,
    quantized_gemm,
    quantized_gemm_matrix,
    quantized_gemv,
    quantized_moe,
    quantized_take,
    rope,
    rope_append,
    row_starts,
    topk,
)
from llmc.schedules.gpu.norm import layer_norm, rms_norm

FAMILIES = (
    gemv, gemm_matrix, gemm, quantized_gemv, quantized_gemm_matrix, quantized_gemm, quantized_take, attend_decode, attend_extend,
    append, moe, quantized_moe, rms_norm, layer_norm, rope, rope_append, topk, row_starts,
)  # fmt: skip
"""In order of preference; the first that matches takes a call."""

LAYOUTS = (layout_mma,)
"""Of quantized weights, in order of preference."""
