"""Kernel families for NVIDIA GPUs, in order of preference.

Those for an architecture come first; the rest, and every shape that they do not take, is for the families of every GPU.
"""

from llmc.schedules import gpu
from llmc.schedules.cuda import (
    advance,
    decode_attention,
    gemv,
    linear_hopper,
    moe_hopper,
    norm_linear,
    prefill_attention,
    quantized_gemv,
    quantized_hopper,
    rms_norm,
    rope_attention,
    sample,
    sample_stats,
)

FAMILIES = (
    linear_hopper, gemv, quantized_hopper, quantized_gemv, norm_linear, decode_attention, rope_attention, prefill_attention,
    moe_hopper, rms_norm, *gpu.FAMILIES, sample_stats, sample, advance,
)  # fmt: skip
"""In order of preference; the first that matches takes a call."""
