"""``llmc.attention``: causal self-attention over the packed tokens of one sequence, the op that importers emit.

``q [n, hq, d]``, ``k [n, hk, d]``, ``v [n, hk, dv]``, optional ``sinks [hq]`` -> ``[n, hq, dv]``; hq is a multiple of hk (GQA).

========== ====================================================================================================
attribute  meaning
========== ====================================================================================================
scale      multiplies q·kᵀ
window     row i sees columns j with i - window < j ≤ i; -1: all j ≤ i
chunk      row i sees columns j ≤ i of its own chunk of this many positions (i // chunk == j // chunk); -1: all
softcap    s ← softcap · tanh(s / softcap) before the mask; 0: none
sinks      1: a per-head logit takes part in the softmax's denominator and adds no value (Xiao et al., 2023)
layer      the attention layer's index, so that the lowering can give each layer its own pages
========== ====================================================================================================

:mod:`llmc.dialect.paged` holds what it is lowered to.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import call, register

OP = "llmc.attention"


def attention(
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    sinks: relax.Expr | None = None,
    *,
    scale: float,
    layer: int,
    window: int = -1,
    chunk: int = -1,
    softcap: float = 0.0,
) -> relax.Call:
    args = [q, k, v] if sinks is None else [q, k, v, sinks]
    return call(
        OP, *args, scale=float(scale), window=int(window), chunk=int(chunk), softcap=float(softcap),
        sinks=int(sinks is not None), layer=int(layer),
    )  # fmt: skip


def _infer(c: relax.Call, _: relax.BlockBuilder) -> TensorType:
    q, v = c.args[0].ty, c.args[2].ty
    return TensorType([q.shape[0], q.shape[1], v.shape[2]], q.dtype)


register(OP, _infer)


def visible(rows: np.ndarray, columns: np.ndarray, window: int = -1, chunk: int = -1) -> np.ndarray:
    """The mask as a boolean ``[len(rows), len(columns)]``: which positions a row at a position may look at."""
    i, j = rows[:, None], columns[None, :]
    mask = j <= i
    if window > 0:
        mask &= i - j < window
    if chunk > 0:
        mask &= i // chunk == j // chunk
    return mask


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sinks: np.ndarray | None = None,
    *,
    scale: float,
    window: int = -1,
    chunk: int = -1,
    softcap: float = 0.0,
    first_row: int = 0,
) -> np.ndarray:
    """float64 reference. ``q [n, hq, d]`` sits at positions first_row ..., ``k [m, hk, d]`` and ``v [m, hk, dv]`` at 0 ..."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = np.einsum("ihd,jhd->hij", q, k) * scale
    if softcap > 0:
        s = softcap * np.tanh(s / softcap)
    mask = visible(first_row + np.arange(q.shape[0]), np.arange(k.shape[0]), window, chunk)
    s = np.where(mask[None], s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks.astype(np.float64)[:, None, None])
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(np.float64)[:, None, None] - top)
    return np.einsum("hij,jhd->ihd", p / total, v)
