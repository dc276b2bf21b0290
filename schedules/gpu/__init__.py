"""Kernel families for every GPU, in order of preference: no instruction of one vendor, all limits from the target's data."""

from llmc.schedules.gpu import append, attend_decode, attend_extend, gemm, gemv, moe, rope, rope_append, topk
from llmc.schedules.gpu.norm import layer_norm, rms_norm

FAMILIES = (gemv, gemm, attend_decode, attend_extend, append, moe, rms_norm, layer_norm, rope, rope_append, topk)
"""In order of preference; the first that matches takes a call."""
