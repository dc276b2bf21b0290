"""``llmc.quantized_linear`` and ``llmc.quantized_take``: :mod:`.linear` and row lookup over a quantized weight.

``quantized_linear``: y = act(x · Wᵀ + bias) + residual, where W [o, k] is what the weight's parts stand for:

==========  ==========================  =========================================================
operand     type                        meaning
==========  ==========================  =========================================================
x           [n, k] compute dtype        activations
parts       as the layout says          one or more tensors, in the layout's order
bias        [o]                         present iff ``bias = 1``
residual    [n, r] compute dtype        added last; present iff ``residual = 1``
result      [n, r] compute dtype        or float32, if ``out_dtype`` says so; r = o, or o / 2 if gated
==========  ==========================  =========================================================

``quantized_take``: ids [n] int32, parts -> the rows of W as ``out_dtype`` [n, k].

Attributes of both: ``scheme`` and ``layout`` name what the parts are (:mod:`llmc.passes.quantize.scheme`,
:mod:`llmc.schedules.layouts`); ``o`` and ``k`` are the weight's shape, which parts may pad. Of the linear layer: ``activations``
``"int8"`` lets a kernel round x to 8 bits, ``"compute"`` keeps it as it is; ``activation``, ``bias`` and ``residual`` are as in
``llmc.linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of, call, register
from llmc.dialect.linear import is_gated

LINEAR = "llmc.quantized_linear"
TAKE = "llmc.quantized_take"
ACTIVATION_DTYPES = ("int8", "compute")


def quantized_linear(
    x: relax.Expr,
    parts: Sequence[relax.Expr],
    bias: relax.Expr | None = None,
    residual: relax.Expr | None = None,
    *,
    scheme: str,
    layout: str,
    o: int,
    k: int,
    activation: str = "none",
    activations: str = "compute",
    **attrs: Any,
) -> relax.Call:
    """A call of ``llmc.quantized_linear``; ``attrs`` may hold ``out_dtype``."""
    args = [x, *parts, *(a for a in (bias, residual) if a is not None)]
    optional = {"bias": int(bias is not None), "residual": int(residual is not None), "activation": activation}
    return call(LINEAR, *args, scheme=scheme, layout=layout, o=o, k=k, activations=activations, **optional, **attrs)


def quantized_take(
    ids: relax.Expr, parts: Sequence[relax.Expr], *, scheme: str, layout: str, o: int, k: int, out_dtype: str
) -> relax.Call:
    """A call of ``llmc.quantized_take``."""
    return call(TAKE, ids, *parts, scheme=scheme, layout=layout, o=o, k=k, out_dtype=out_dtype)


def _linear_type(c: relax.Call, _: relax.BlockBuilder) -> TensorType:
    x, attrs = c.args[0].ty, attrs_of(c)
    results = attrs["o"] // 2 if is_gated(attrs["activation"]) else attrs["o"]
    return TensorType([*list(x.shape)[:-1], results], attrs.get("out_dtype", x.dtype))


def _take_type(c: relax.Call, _: relax.BlockBuilder) -> TensorType:
    attrs = attrs_of(c)
    return TensorType([*list(c.args[0].ty.shape), attrs["k"]], attrs["out_dtype"])


register(LINEAR, _linear_type)
register(TAKE, _take_type)
