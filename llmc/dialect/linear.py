"""``llmc.linear``: y = act(x · weightᵀ + bias) + residual, the weight row-major as stored (NT), never transposed at run time.

==========  ==========================  =========================================================
operand     type                        meaning
==========  ==========================  =========================================================
x           [n, k] compute dtype        activations
weight      [o, k] storage dtype        may be a narrower dtype; products accumulate in float32
bias        [o]                         present iff ``bias = 1``
residual    [n, r] compute dtype        added last; present iff ``residual = 1``
result      [n, r] compute dtype        or float32, if ``out_dtype`` says so; r = o, or o / 2 if gated
==========  ==========================  =========================================================

``activation``: one of :data:`ACTIVATIONS`, applied after the bias and before the residual. With :data:`GATED` behind its name,
the weight is the gate's rows above as many of another matrix, y = act(gate) · other: a gated feed-forward layer's first
half (Shazeer, "GLU Variants Improve Transformer"). ``out_dtype``: ``"float32"`` where the sums are wanted as they are (the logits
of a narrow model); absent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of, call, register

OP = "llmc.linear"
GATED = "_gated"
"""Ends the name of an activation whose value is a factor: ``"silu_gated"``."""


def is_gated(activation: str) -> bool:
    return activation.endswith(GATED)


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def linear(
    x: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr | None = None,
    residual: relax.Expr | None = None,
    activation: str = "none",
) -> relax.Call:
    args = [x, weight, *(a for a in (bias, residual) if a is not None)]
    return call(OP, *args, bias=int(bias is not None), residual=int(residual is not None), activation=activation)


def _infer(c: relax.Call, _: relax.BlockBuilder) -> TensorType:
    x, weight = c.args[0].ty, c.args[1].ty
    attrs = attrs_of(c)
    results = weight.shape[0] // 2 if is_gated(attrs["activation"]) else weight.shape[0]
    return TensorType([*list(x.shape)[:-1], results], attrs.get("out_dtype", x.dtype))


register(OP, _infer)


def reference(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    *,
    activation: str = "none",
) -> np.ndarray:
    """The op in float64 NumPy: x [n, k], weight [o, k], bias [o], residual [n, r] -> [n, r] float64."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias.astype(np.float64)
    gate, other = np.split(y, 2, axis=1) if is_gated(activation) else (y, 1.0)
    y = ACTIVATIONS[activation.removesuffix(GATED)](gate) * other
    return y if residual is None else y + residual.astype(np.float64)
