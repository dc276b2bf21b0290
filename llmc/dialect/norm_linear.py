"""``llmc.norm_linear``: a linear layer that takes the RMS norm of its rows itself.

``norm_linear(x, ...)`` is ``linear(x / sqrt(mean(x²) + eps), ...)``: a norm without a weight, which is in the layer's
(:mod:`llmc.passes.fold_gain`). Operands and attributes are those of ``llmc.linear``, or of ``llmc.quantized_linear`` if there is a
``scheme``, and the norm's ``eps``. The norm's result is not rounded in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax
from tvm.relax import TensorType

from llmc.dialect import linear, quantized
from llmc.dialect.core import attrs_of, call, register
from llmc.dialect.linear import is_gated

OP = "llmc.norm_linear"


def linear_op(attrs: Mapping[str, Any]) -> str:
    """The operator that a call with these attributes is with a norm before it."""
    return quantized.LINEAR if "scheme" in attrs else linear.OP


def norm_linear(norm: relax.Call, layer: relax.Call) -> relax.Call:
    """The call that stands for ``layer``, a linear or quantized linear, of ``norm``, an RMS norm whose weight is one."""
    return call(OP, norm.args[0], *list(layer.args)[1:], **attrs_of(layer), eps=attrs_of(norm)["eps"])


def _infer(c: relax.Call, _: relax.BlockBuilder) -> TensorType:
    x, weight, attrs = c.args[0].ty, c.args[1].ty, attrs_of(c)
    outputs = attrs["o"] if "scheme" in attrs else weight.shape[0]
    results = outputs // 2 if is_gated(attrs["activation"]) else outputs
    return TensorType([*list(x.shape)[:-1], results], attrs.get("out_dtype", x.dtype))


register(OP, _infer)
