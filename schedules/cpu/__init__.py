"""Kernel families for CPUs: hand-written TIR with explicit SIMD, parameterised by vector width and register count only.

Every kernel here is *batch invariant*: the order of the additions behind one output element depends on the element's own
shape and position, never on how many rows the call has or which tile a row falls into. A sequence gets bit-identical
results alone, in a batch, in the decode phase and in the extend phase (but for :mod:`.linear_tiles`, whose sums the decode phase
makes in another order).
"""

from llmc.schedules.cpu import (
    append,
    attend,
    layout_panel,
    layout_plain,
    linear,
    linear_tiles,
    moe,
    quantized_linear,
    quantized_linear_plain,
    quantized_moe,
    quantized_take,
    quantized_take_plain,
    rope,
    rope_append,
    row_starts,
    topk,
)
from llmc.schedules.cpu.norm import layer_norm, rms_norm

FAMILIES = (
    linear_tiles, linear, quantized_linear, quantized_take, quantized_linear_plain, quantized_take_plain,
    attend, append, moe, quantized_moe, rms_norm, layer_norm, rope, rope_append, topk, row_starts,
)  # fmt: skip
"""In order of preference; the first that matches takes a call."""

LAYOUTS = (layout_panel, layout_plain)
"""How quantized weights are stored, in order of preference; the first that takes a matrix stores it."""
