"""The graph dialect: the ops that importers emit beside ordinary Relax ops, and that the passes lower to kernels.

Importing this package registers every op. Each module holds one op or a pair that belongs together: its meaning, its type
rule and its NumPy reference. The IR is persisted as JSON (``tvm.ir.save_json``): TVMScript text does not round-trip Python ops.
"""

from llmc.dialect import (
    attention,
    linear,
    moe,
    norm,
    norm_linear,
    paged,
    quantized,
    quantized_moe,
    rope,
    rope_append,
    rope_attend,
    row_starts,
    topk,
)
from llmc.dialect.core import attrs_of, call, is_call

__all__ = [
    "attention",
    "attrs_of",
    "call",
    "is_call",
    "linear",
    "moe",
    "norm",
    "norm_linear",
    "paged",
    "quantized",
    "quantized_moe",
    "rope",
    "rope_append",
    "rope_attend",
    "row_starts",
    "topk",
]
