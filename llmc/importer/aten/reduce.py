"""Reductions over dimensions, softmax, cumulative sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import relax

from llmc.importer.aten.registry import converts
from llmc.importer.report import Refused
from llmc.importer.values import Tensor, is_one, stored_shape
from llmc.importer.walker import Walker

R = relax.op


def reduced(w: Walker, node: torch.fx.Node, op: Callable[..., relax.Expr], a: Tensor, dims: Any, dtype: str) -> Tensor:
    """``op`` over torch dimensions ``dims`` (None: all) of ``a`` in ``dtype``, in the shape torch recorded."""
    if dims is None or dims == []:
        dims = list(range(a.ndim))
    dims = [d % a.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    lead = a.ndim - len(stored_shape(a.shape))
    for d in dims:
        w.rowwise(a.shape[d], "a reduction")
    axes = [d - lead for d in dims if d >= lead]
    value = w.cast(a, dtype)
    shape, _ = w.meta(node, None) if isinstance(node.meta["val"], torch.Tensor) else w.meta(node, 0)
    if not axes:
        return w.reshape(value, shape)
    kept = w.emit(op(value.expr, axes, keepdims=True))
    keep_shape = tuple(1 if d in dims else s for d, s in enumerate(a.shape))
    settled = w.tensor(kept, keep_shape, dtype)
    return w.reshape(settled, shape)


def _reduction(op: Callable[..., relax.Expr]) -> Callable[..., Tensor]:
    def convert(w: Walker, node: torch.fx.Node, a: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
        return reduced(w, node, op, a, dim, w.meta(node)[1])

    return convert


for _names, _op in {("aten.sum",): R.sum, ("aten.mean",): R.mean, ("aten.amax",): R.max, ("aten.amin",): R.min}.items():
    converts(*_names)(_reduction(_op))


@converts("aten.max", "aten.min")
def max_min(w: Walker, node: torch.fx.Node, a: Tensor, *rest: Any) -> Any:
    """``max(a)``, ``max(a, b)`` elementwise, or ``max(a, dim)``: (values, indices)."""
    largest = str(node.target).startswith("aten.max")
    if rest and isinstance(rest[0], Tensor):
        from llmc.importer.aten.elementwise import binary

        return binary(w, node, R.maximum if largest else R.minimum, a, rest[0])
    op = R.max if largest else R.min
    if not rest:
        return reduced(w, node, op, a, None, a.dtype)
    values = reduced(w, node, op, a, rest[0], a.dtype)
    shape, dtype = w.meta(node, 1)
    index = R.argmax(a.expr, w.axis(a, rest[0])) if largest else R.argmin(a.expr, w.axis(a, rest[0]))
    return values, w.tensor(R.astype(w.emit(index), dtype), shape, dtype)


@converts("aten.argmax", "aten.argmin")
def argmax(w: Walker, node: torch.fx.Node, a: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    if dim is None:
        raise Refused("an argmax over all tokens")
    w.rowwise(a.shape[dim], "an argmax")
    op = R.argmax if "argmax" in str(node.target) else R.argmin
    shape, dtype = w.meta(node)
    return w.tensor(R.astype(w.emit(op(a.expr, w.axis(a, dim))), dtype), shape, dtype)


@converts("aten.any", "aten.all")
def any_all(w: Walker, node: torch.fx.Node, a: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    number = Tensor(w.emit(R.astype(a.expr, "int32")), a.shape, "int32")
    op = R.max if "any" in str(node.target) else R.min
    return w.cast(reduced(w, node, op, number, dim, "int32"), "bool")


@converts("aten.var", "aten.std")
def var_std(
    w: Walker,
    node: torch.fx.Node,
    a: Tensor,
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: Any = None,
) -> Tensor:
    dims = [dim] if isinstance(dim, int) else dim or list(range(a.ndim))
    count = 1
    for d in dims:
        size = a.shape[d % a.ndim]
        if not isinstance(size, int):
            raise Refused("a variance over tokens")
        count *= size
    lost = correction if correction is not None else (1 if unbiased in (None, True) else 0)
    dtype = w.meta(node)[1]
    biased = reduced(w, node, R.variance, a, dims, dtype)
    if lost:
        biased = w.like(node, R.multiply(biased.expr, w.constant(count / (count - lost), dtype)))
    return w.like(node, R.sqrt(biased.expr)) if "std" in str(node.target) else biased


@converts("aten.linalg_vector_norm", "aten.norm")
def vector_norm(
    w: Walker, node: torch.fx.Node, a: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Tensor:
    dtype = w.meta(node)[1]
    value = w.cast(a, dtype)
    if order in (2, None):
        square = Tensor(w.emit(R.multiply(value.expr, value.expr)), a.shape, dtype)
        return w.like(node, R.sqrt(reduced(w, node, R.sum, square, dim, dtype).expr))
    if order == 1:
        return reduced(w, node, R.sum, Tensor(w.emit(R.abs(value.expr)), a.shape, dtype), dim, dtype)
    raise Refused(f"a vector norm of order {order}")


@converts("aten.logsumexp")
def logsumexp(w: Walker, node: torch.fx.Node, a: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else dim
    for d in dims:
        w.rowwise(a.shape[d], "a reduction")
    axes = [w.axis(a, d) for d in dims]
    top = w.emit(R.max(a.expr, axes, keepdims=True))
    total = w.emit(R.sum(w.emit(R.exp(w.emit(R.subtract(a.expr, top)))), axes, keepdims=True))
    kept = tuple(1 if d in [x % a.ndim for x in dims] else s for d, s in enumerate(a.shape))
    value = w.tensor(R.add(w.emit(R.log(total)), top), kept, a.dtype)
    return w.reshape(value, w.meta(node)[0])


@converts("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    dtype = w.meta(node)[1]
    op = R.nn.log_softmax if "log_softmax" in str(node.target) else R.nn.softmax
    w.rowwise(a.shape[dim], "a softmax")
    if is_one(a.shape[dim]):
        raise Refused("a softmax over one element")
    return w.like(node, op(w.cast(a, dtype).expr, axis=w.axis(a, dim)))


@converts("aten.cumsum")
def cumsum(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, **_: Any) -> Tensor:
    w.rowwise(a.shape[dim], "a cumulative sum")
    dtype = w.meta(node)[1]
    return w.like(node, R.cumsum(w.cast(a, dtype).expr, axis=w.axis(a, dim), dtype=dtype))
