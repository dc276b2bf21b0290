"""Matrix products and normalisations."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax

from llmc.dialect import norm
from llmc.dialect.linear import linear as linear_op
from llmc.importer.aten.registry import converts
from llmc.importer.report import Refused
from llmc.importer.values import Tensor, stored_shape
from llmc.importer.walker import Walker

R = relax.op


def flat_linear(w: Walker, node: torch.fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``llmc.linear`` of x with every dimension but the last merged into rows; weight is [o, k]."""
    rows = x.expr
    lead = stored_shape(x.shape)[:-1]
    if len(lead) != 1:
        count: Any = 1
        for size in lead:
            count = count * w.prim(size)
        rows = w.emit(R.reshape(rows, [count, w.prim(x.shape[-1])]))
    matrix = weight.param if weight.param is not None else w.restored(weight)
    y = w.emit(linear_op(rows, matrix, None if bias is None else w.cast(bias, x.dtype).expr))
    shape, dtype = w.meta(node)
    if len(lead) != 1:
        y = R.reshape(y, w.prims(stored_shape(shape)))
    return w.tensor(y, shape, dtype)


@converts("aten.linear")
def linear(w: Walker, node: torch.fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return flat_linear(w, node, x, weight, bias)


def product(w: Walker, node: torch.fx.Node, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a · b``: with a matrix parameter on the right it is a linear over its transpose, which is made while streaming."""
    w.rowwise(a.shape[-1], "a sum of products")
    turned = w.transposed_parameter(b)
    if turned is not None and len(stored_shape(a.shape)) >= 1 and a.ndim >= 2:
        return flat_linear(w, node, a, turned, bias)
    _, dtype = w.meta(node)
    left, right = w.cast(a, dtype).expr, w.cast(b, dtype).expr
    value = w.emit(R.matmul(left, right))
    if bias is not None:
        value = w.emit(R.add(value, w.cast(bias, dtype).expr))
    return w.like(node, value)


@converts("aten.mm", "aten.matmul", "aten.bmm")
def matmul(w: Walker, node: torch.fx.Node, a: Tensor, b: Tensor) -> Tensor:
    if min(a.ndim, b.ndim) < 2 or min(len(stored_shape(a.shape)), len(stored_shape(b.shape))) < 2:
        # A dropped dimension would be one of the product's own: give both their full rank.
        _, dtype = w.meta(node)
        full_a = Tensor(w.restored(a), a.shape, a.dtype)
        full_b = Tensor(w.restored(b), b.shape, b.dtype)
        return w.like(node, R.matmul(w.cast(full_a, dtype).expr, w.cast(full_b, dtype).expr))
    return product(w, node, a, b)


@converts("aten.addmm")
def addmm(w: Walker, node: torch.fx.Node, bias: Tensor, a: Tensor, b: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise Refused("addmm with alpha or beta")
    return product(w, node, a, b, bias)


@converts("aten.einsum")
def einsum(w: Walker, node: torch.fx.Node, equation: str, operands: list[Tensor], **_: Any) -> Tensor:
    """An einsum with the tokens as a free label; ellipses are not read."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if "." in equation or not arrow:
        raise Refused(f"the einsum {equation}")
    for labels, operand in zip(inputs.split(","), operands, strict=True):
        for label, size in zip(labels, operand.shape, strict=True):
            if label not in output:
                w.rowwise(size, "a sum of products")
    dtype = w.meta(node)[1]
    full = [Tensor(w.restored(o), o.shape, o.dtype) for o in operands]
    return w.like(node, R.einsum([w.cast(o, dtype).expr for o in full], equation))


@converts("aten.layer_norm")
def layer_norm(
    w: Walker,
    node: torch.fx.Node,
    x: Tensor,
    normalized: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if len(normalized) != 1:
        raise Refused("a layer norm over several dimensions")
    _, dtype = w.meta(node)
    width = normalized[0]
    gamma = w.cast(weight, dtype).expr if weight is not None else w.emit(R.ones([width], dtype))
    beta = w.cast(bias, dtype).expr if bias is not None else w.emit(R.zeros([width], dtype))
    return w.like(node, norm.layer_norm(w.cast(x, dtype).expr, gamma, beta, eps))


@converts("aten.rms_norm")
def rms_norm(
    w: Walker, node: torch.fx.Node, x: Tensor, normalized: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if len(normalized) != 1:
        raise Refused("an RMS norm over several dimensions")
    _, dtype = w.meta(node)
    gamma = w.cast(weight, dtype).expr if weight is not None else w.emit(R.ones([normalized[0]], dtype))
    if eps is None:
        eps = torch.finfo(getattr(torch, dtype)).eps
    return w.like(node, norm.rms_norm(w.cast(x, dtype).expr, gamma, eps))


@converts("aten.group_norm")
def group_norm(w: Walker, node: torch.fx.Node, x: Tensor, groups: int, *_: Any) -> Tensor:
    raise Refused("a group norm")
