"""``llmc.moe``: the expert part of a mixture of experts, after routing (Shazeer et al., 2017; Jiang et al., 2024).

``x [n, h]``, ``ids [n, t] i32``, ``weights [n, t]``, ``gate_up [E, 2i, h]``, ``down [E, h, i]`` and, iff ``bias = 1``,
``gate_up_bias [E, 2i]``, ``down_bias [E, h]`` -> ``[n, h]``:
``y[r] = Σ_j weights[r, j] · down[e] · (act(g) * (u + offset))`` with ``[g; u] = gate_up[e] · x[r]``, ``e = ids[r, j]``.

========== ====================================================================================================
attribute  meaning
========== ====================================================================================================
top_k      t, the experts of one token
activation one of ``llmc.dialect.linear.ACTIVATIONS``
gated      1 as above; 0: ``gate_up`` is ``[E, i, h]`` and the hidden value is act(gate_up[e] · x)
interleave 1: rows of gate_up alternate gate, up, gate, up; 0: first all gates, then all ups
bias       1: both projections have a bias
alpha      the activation is act(alpha · g) / alpha; 1 unless a model sharpens its gate
limit      g is clipped to at most this and u to ± this before gating; 0: neither
offset     added to u after clipping
========== ====================================================================================================
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from llmc.dialect.core import call, register
from llmc.dialect.linear import ACTIVATIONS

OP = "llmc.moe"


def moe(
    x: relax.Expr,
    ids: relax.Expr,
    weights: relax.Expr,
    gate_up: relax.Expr,
    down: relax.Expr,
    gate_up_bias: relax.Expr | None = None,
    down_bias: relax.Expr | None = None,
    *,
    top_k: int,
    activation: str,
    gated: bool = True,
    interleave: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
    offset: float = 0.0,
) -> relax.Call:
    args = [x, ids, weights, gate_up, down]
    if gate_up_bias is not None and down_bias is not None:
        args += [gate_up_bias, down_bias]
    return call(
        OP, *args, top_k=int(top_k), activation=activation, gated=int(gated), interleave=int(interleave),
        bias=int(len(args) == 7), alpha=float(alpha), limit=float(limit), offset=float(offset),
    )  # fmt: skip


register(OP, lambda c, _: c.args[0].ty)


def gate(
    g: np.ndarray, u: np.ndarray, *, activation: str, alpha: float = 1.0, limit: float = 0.0, offset: float = 0.0
) -> np.ndarray:
    """How gate and up combine: ``act(alpha · g) / alpha * (u + offset)``, both clipped first if there is a limit."""
    if limit > 0:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return ACTIVATIONS[activation](alpha * g) / alpha * (u + offset)


def reference(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    *,
    activation: str,
    gated: int = 1,
    interleave: int = 0,
    alpha: float = 1.0,
    limit: float = 0.0,
    offset: float = 0.0,
) -> np.ndarray:
    """float64 reference of ``llmc.moe``, one token and one expert at a time."""
    act = ACTIVATIONS[activation]
    y = np.zeros(x.shape)
    for r in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[r, j])
            h = gate_up[e].astype(np.float64) @ x[r].astype(np.float64)
            if gate_up_bias is not None:
                h = h + gate_up_bias[e]
            if gated:
                g, u = (h[0::2], h[1::2]) if interleave else np.split(h, 2)
                h = gate(g, u, activation=activation, alpha=alpha, limit=limit, offset=offset)
            else:
                h = act(h)
            o = down[e].astype(np.float64) @ h
            if down_bias is not None:
                o = o + down_bias[e]
            y[r] += float(weights[r, j]) * o
    return y
