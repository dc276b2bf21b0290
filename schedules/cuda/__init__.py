"""Kernel families for NVIDIA GPUs, in order of preference.

Norms, rope, append, topk and experts are those of every GPU (``schedules/gpu``), and so is what takes the linears and the attention
that no family for an architecture does.
"""

from llmc.schedules.cuda import (
    advance,
    decode_attention,
    gemv,
    layout_mma,
    linear_hopper,
    moe_hopper,
    prefill_attention,
    quantized_gemv,
    quantized_hopper,
    quantized_simple,
    quantized_take,
    sample,
    sample_stats,
)
from llmc.schedules.gpu import append, attend_decode, attend_extend, gemm, moe, rope, rope_append, topk
from llmc.schedules.gpu import gemv as gpu_gemv
from llmc.schedules.gpu.norm import layer_norm, rms_norm

FAMILIES = (
    linear_hopper, gemv, gpu_gemv, gemm, quantized_hopper, quantized_gemv, quantized_simple, quantized_take,
    decode_attention, prefill_attention, attend_decode, attend_extend, append, moe_hopper, moe, rms_norm, layer_norm, rope,
    rope_append, topk, sample_stats, sample, advance,
)  # fmt: skip
"""In order of preference; the first that matches takes a call."""

LAYOUTS = (layout_mma,)
"""Of quantized weights, in order of preference."""
