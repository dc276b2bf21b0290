"""``llmc.linear``: y = act(x · weightᵀ + bias) + residual, the weight row-major as stored (NT), never transposed at run time.

==========  ==========================  =========================================================
operand     type                        meaning
==========  ==========================  =========================================================
x           [n, k] compute dtype        activations
weight      [o, k] storage dtype        may be a narrower dtype; products accumulate in float32
bias        [o]                         present iff ``bias = 1``
residual    [n, o] compute dtype        added last; present iff ``residual = 1``
result      [n, o] compute dtype        or float32, if ``out_dtype`` says so
==========  ==========================  =========================================================

``activation``: one of :data:`ACTIVATIONS`, applied after the bias and before the residual. ``out_dtype``: ``"float32"``
where the sums are wanted as they are (the logits of a narrow model); absent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of, call, register

OP = "llmc.linear"


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
    return TensorType([*list(x.shape)[:-1], weight.shape[0]], attrs_of(c).get("out_dtype", x.dtype))


register(OP, _infer)


def reference(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    *,
    activation: str = "none",
) -> np.ndarray:
    """The op in float64 NumPy: x [n, k], weight [o, k], bias [o], residual [n, o] -> [n, o] float64."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias.astype(np.float64)
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.astype(np.float64)
