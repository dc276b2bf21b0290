"""Kernel families for NVIDIA GPUs, in order of preference.

The simple ones (norms, rope, append, topk, moe) are portable from sm_80 on; the ones for one architecture come before the fallback
that takes every shape.
"""

from llmc.schedules.cuda import (
    advance,
    append,
    attend_simple,
    decode_attention,
    gemv,
    layout_mma,
    linear_hopper,
    linear_simple,
    moe,
    prefill_attention,
    quantized_gemv,
    quantized_hopper,
    quantized_simple,
    quantized_take,
    rope,
    rope_append,
    sample,
    sample_stats,
    topk,
)
from llmc.schedules.cuda.norm import layer_norm, rms_norm

FAMILIES = (
    linear_hopper, gemv, linear_simple, quantized_hopper, quantized_gemv, quantized_simple, quantized_take,
    decode_attention, prefill_attention, attend_simple, append, moe, rms_norm, layer_norm, rope, rope_append, topk,
    sample_stats, sample, advance,
)  # fmt: skip
"""In order of preference; the first that matches takes a call."""

LAYOUTS = (layout_mma,)
"""Of quantized weights, in order of preference."""
