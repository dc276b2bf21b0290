"""Lookups: embedding, gather, indexing by tensors, scatter, top-k, one-hot."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax

from llmc.dialect.topk import topk as topk_op
from llmc.importer.aten.elementwise import spread
from llmc.importer.aten.registry import converts
from llmc.importer.report import Refused
from llmc.importer.values import Tensor, stored_shape
from llmc.importer.walker import Walker

R = relax.op


@converts("aten.embedding")
def embedding(w: Walker, node: torch.fx.Node, weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> Tensor:
    _, dtype = w.meta(node)
    return w.like(
        node, R.astype(w.emit(taken(w, weight.expr, ids, 0)), dtype) if weight.dtype != dtype else taken(w, weight.expr, ids, 0)
    )


def taken(w: Walker, table: relax.Expr, ids: Tensor, axis: int) -> relax.Expr:
    return R.take(table, ids.expr, axis=axis, mode="fast")


def looked_up(w: Walker, a: Tensor, dim: int, ids: Tensor) -> relax.Expr:
    """``a`` at ``ids`` along a torch dimension, which must not be the tokens."""
    w.rowwise(a.shape[dim], "a lookup")
    return taken(w, a.expr, ids, w.axis(a, dim))


@converts("aten.index_select")
def index_select(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, ids: Tensor) -> Tensor:
    return w.like(node, looked_up(w, a, dim, ids))


@converts("aten.index")
def index(w: Walker, node: torch.fx.Node, a: Tensor, indices: list[Any]) -> Tensor:
    """``a[ids]`` along one dimension, or ``a[ids0, ids1]`` along the first dimensions."""
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if any(i.dtype == "bool" for _, i in used):
        raise Refused("indexing by a mask, whose result has a size that depends on the data")
    if len(used) == 1:
        dim, ids = used[0]
        return w.like(node, looked_up(w, a, dim, ids))
    if [d for d, _ in used] != list(range(len(used))):
        raise Refused("indexing by several tensors that are not along the first dimensions")
    for d, _ in used:
        w.rowwise(a.shape[d], "a lookup")
    return w.like(node, R.index_tensor(w.restored(a), [i.expr for _, i in used]))


@converts("aten.gather")
def gather(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, ids: Tensor, **_: Any) -> Tensor:
    w.rowwise(a.shape[dim], "a lookup")
    if len(stored_shape(a.shape)) != len(stored_shape(ids.shape)):
        shape, dtype = w.meta(node)
        expr = R.gather_elements(w.restored(a), w.restored(ids), axis=dim % a.ndim)
        return w.tensor(expr, shape, dtype)
    return w.like(node, R.gather_elements(a.expr, ids.expr, axis=w.axis(a, dim)))


@converts("aten.scatter")
def scatter(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, ids: Tensor, value: Any, **_: Any) -> Tensor:
    """``out[i][ids[i][j]] = value[i][j]`` along ``dim``; a number is spread over the shape of ids."""
    w.rowwise(a.shape[dim], "an assignment")
    updates = w.cast(value, a.dtype).expr if isinstance(value, Tensor) else spread(w, value, ids.shape, a.dtype)
    return w.like(node, R.scatter_elements(a.expr, ids.expr, updates, axis=w.axis(a, dim)))


@converts("aten.topk")
def topk(w: Walker, node: torch.fx.Node, a: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """(values, indices) of the k largest along the last dimension."""
    if dim % a.ndim != a.ndim - 1 or not largest:
        raise Refused("a top-k that is not of the largest values of the last dimension")
    rows = w.emit(R.reshape(a.expr, [-1, w.prim(a.shape[-1])])) if len(stored_shape(a.shape)) != 2 else a.expr
    ids = w.emit(topk_op(rows, k))
    values = w.emit(R.gather_elements(rows, ids, axis=1))
    value_shape, value_dtype = w.meta(node, 0)
    index_shape, _ = w.meta(node, 1)
    flat = (rows.ty.shape[0], k)

    def settle(expr: relax.Expr, shape: Any, dtype: str) -> Tensor:
        stored = stored_shape(shape)
        return w.tensor(R.reshape(expr, w.prims(stored)) if len(stored) != len(flat) else expr, shape, dtype)

    return settle(values, value_shape, value_dtype), settle(ids, index_shape, "int32")


@converts("aten.one_hot")
def one_hot(w: Walker, node: torch.fx.Node, a: Tensor, classes: int) -> Tensor:
    shape, dtype = w.meta(node)
    return w.tensor(R.one_hot(a.expr, relax.prim_value(1), relax.prim_value(0), classes, -1), shape, dtype)
