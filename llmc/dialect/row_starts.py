"""``llmc.row_starts``: where each sequence's rows begin among the rows with logits: ``q_indptr`` for attention over these alone.

``logit_rows [r] i32``, in order; ``q_indptr [b+1] i32``; ``seq_lens [b] i32``, of which only the number counts
-> ``[b+1] i32``: how many of ``logit_rows`` are before each row of ``q_indptr``.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import call, register

OP = "llmc.row_starts"


def row_starts(logit_rows: relax.Expr, q_indptr: relax.Expr, seq_lens: relax.Expr) -> relax.Call:
    return call(OP, logit_rows, q_indptr, seq_lens)


register(OP, lambda c, _: TensorType([c.args[2].ty.shape[0] + 1], "int32"))


def reference(logit_rows: np.ndarray, q_indptr: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
    return (logit_rows < q_indptr[:, None]).sum(axis=1).astype(np.int32)
