"""``llmc.topk``: the indices of the k largest values of each row, largest first; among equals the lower index wins.

``x [n, e]`` -> ``[n, k] int32``. Attribute ``k``. Routers use it over at most a few hundred experts; values are gathered after.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import call, register

OP = "llmc.topk"


def topk(x: relax.Expr, k: int) -> relax.Call:
    return call(OP, x, k=int(k))


register(OP, lambda c, _: TensorType([c.args[0].ty.shape[0], int(c.attrs["k"])], "int32"))


def reference(x: np.ndarray, *, k: int) -> np.ndarray:
    """int32 [n, k]: a stable sort keeps the lower index first among equal values."""
    return np.argsort(-x.astype(np.float64), axis=-1, kind="stable")[:, :k].astype(np.int32)
