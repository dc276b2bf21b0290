"""The graph dialect: the ops that importers emit beside ordinary Relax ops, and that the passes lower to kernels.

Importing this package registers every op. Each module holds one op or a pair that belongs together: its meaning, its type
rule and its NumPy reference. The IR is persisted as JSON (``tvm.ir.save_json``): TVMScript text does not round-trip Python ops.
"""

from llmc.dialect.attention import attention
from llmc.dialect.core import attrs_of, call, is_call
from llmc.dialect.linear import linear
from llmc.dialect.moe import moe
from llmc.dialect.norm import layer_norm, rms_norm
from llmc.dialect.paged import append, attend
from llmc.dialect.rope import rope
from llmc.dialect.topk import topk

__all__ = [
    "append", "attend", "attention", "attrs_of", "call", "is_call", "layer_norm", "linear", "moe", "rms_norm", "rope",
    "topk",
]  # fmt: skip
