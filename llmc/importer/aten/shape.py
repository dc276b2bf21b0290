"""Ops that only rearrange: views, permutations, slices, joins, repeats."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax

from llmc.importer.aten.elementwise import broadcast
from llmc.importer.aten.registry import converts
from llmc.importer.report import Refused
from llmc.importer.values import Size, Tensor, is_one, stored_shape
from llmc.importer.walker import Walker

R = relax.op


@converts(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.squeeze",
    "aten.unsqueeze",
    "aten.view_as",
    "aten.reshape_as",
)
def reshape(w: Walker, node: torch.fx.Node, a: Tensor, *_: Any, **__: Any) -> Tensor:
    """All of these keep the order of the elements; torch has worked out the shape."""
    shape, dtype = w.meta(node)
    if dtype != a.dtype:
        raise Refused(f"a view of {a.dtype} as {dtype}")
    return w.reshape(a, shape)


@converts("aten.expand", "aten.expand_as")
def expand(w: Walker, node: torch.fx.Node, a: Tensor, *_: Any, **__: Any) -> Tensor:
    return broadcast(w, a, w.meta(node)[0])


def permuted(w: Walker, a: Tensor, order: list[int]) -> Tensor:
    """``a`` with its torch dimensions in ``order``."""
    shape = tuple(a.shape[i] for i in order)
    # Unit dimensions can be anywhere without changing the order of the elements: only the others decide.
    solid = [i for i in order if not is_one(a.shape[i])]
    if solid == sorted(solid):
        return w.reshape(a, shape)
    rank = {dim: position for position, dim in enumerate(sorted(solid))}
    squeezed = w.reshape(a, [s for s in a.shape if not is_one(s)])
    moved = w.tensor(R.permute_dims(squeezed.expr, [rank[i] for i in solid]), [a.shape[i] for i in solid], a.dtype)
    return w.reshape(moved, shape)


@converts("aten.transpose")
def transpose(w: Walker, node: torch.fx.Node, a: Tensor, dim0: int, dim1: int) -> Tensor:
    order = list(range(a.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permuted(w, a, order)


@converts("aten.t", "aten.numpy_T")
def t(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    return permuted(w, a, list(reversed(range(a.ndim))))


@converts("aten.permute")
def permute(w: Walker, node: torch.fx.Node, a: Tensor, dims: list[int]) -> Tensor:
    return permuted(w, a, [d % a.ndim for d in dims])


@converts("aten.movedim")
def movedim(w: Walker, node: torch.fx.Node, a: Tensor, source: int, destination: int) -> Tensor:
    order = list(range(a.ndim))
    moved = order.pop(source % a.ndim)
    order.insert(destination % a.ndim, moved)
    return permuted(w, a, order)


def sliced(w: Walker, a: Tensor, dim: int, start: Any, end: Any, step: int, shape: tuple[Size, ...]) -> Tensor:
    """``a[start:end:step]`` along a torch dimension; ``shape`` is the result's."""
    if shape == a.shape:
        return a
    w.rowwise(a.shape[dim], "a slice")
    axis = w.axis(a, dim)
    extent = w.prim(a.shape[dim % a.ndim])
    first, last = w.prim(start or 0), extent if end is None else w.prim(end)
    if isinstance(extent, int) and isinstance(first, int) and isinstance(last, int):
        first, last, _ = slice(first, last, step).indices(extent)
    elif isinstance(first, int) and first < 0:
        first = extent + first
    expr = R.strided_slice(a.expr, [axis], [first], [last], [step], assume_inbound=True)
    return w.tensor(expr, shape, a.dtype)


@converts("aten.slice")
def slice_(w: Walker, node: torch.fx.Node, a: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    return sliced(w, a, dim, start, end, step, w.meta(node)[0])


@converts("aten.narrow")
def narrow(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    return sliced(w, a, dim, start, start + length, 1, w.meta(node)[0])


def selected(w: Walker, a: Tensor, dim: int, index: Any) -> Tensor:
    """``a`` at one index of a torch dimension, which disappears."""
    dim = dim % a.ndim
    shape = a.shape[:dim] + a.shape[dim + 1 :]
    if is_one(a.shape[dim]):
        return w.reshape(a, shape)
    if isinstance(index, int) and index < 0:
        index = a.shape[dim] + index
    one = sliced(w, a, dim, index, index + 1, 1, (*a.shape[:dim], 1, *a.shape[dim + 1 :]))
    return w.reshape(one, shape)


@converts("aten.select")
def select(w: Walker, node: torch.fx.Node, a: Tensor, dim: int, index: Any) -> Tensor:
    return selected(w, a, dim, index)


@converts("aten.unbind")
def unbind(w: Walker, node: torch.fx.Node, a: Tensor, dim: int = 0) -> list[Tensor]:
    count = a.shape[dim % a.ndim]
    if not isinstance(count, int):
        raise Refused("unbinding the tokens")
    return [selected(w, a, dim, i) for i in range(count)]


def parted(w: Walker, node: torch.fx.Node, a: Tensor, dim: int) -> list[Tensor]:
    """``a`` cut along a torch dimension into the pieces torch recorded for the node."""
    pieces, start = [], 0
    for i in range(len(node.meta["val"])):
        shape, _ = w.meta(node, i)
        size = shape[dim % a.ndim]
        if not isinstance(size, int):
            raise Refused("a split of the tokens")
        pieces.append(sliced(w, a, dim, start, start + size, 1, shape))
        start += size
    return pieces


@converts("aten.split", "aten.split_with_sizes", "aten.chunk")
def split(w: Walker, node: torch.fx.Node, a: Tensor, _: Any, dim: int = 0) -> list[Tensor]:
    return parted(w, node, a, dim)


@converts("aten.slice_scatter")
def slice_scatter(
    w: Walker, node: torch.fx.Node, a: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    """``a`` with ``a[start:end]`` along ``dim`` replaced by ``source``: what is before, the source, what is after."""
    dim = dim % a.ndim
    extent = a.shape[dim]
    if step != 1 or not isinstance(extent, int):
        raise Refused("an assignment to a part of the tokens, or to every other element")
    first, last, _ = slice(start, end).indices(extent)

    def piece(low: int, high: int) -> Tensor:
        return sliced(w, a, dim, low, high, 1, (*a.shape[:dim], high - low, *a.shape[dim + 1 :]))

    before = [piece(0, first)] if first > 0 else []
    after = [piece(last, extent)] if last < extent else []
    return cat(w, node, [*before, source, *after], dim)


@converts("aten.cat", "aten.concat")
def cat(w: Walker, node: torch.fx.Node, parts: list[Tensor], dim: int = 0) -> Tensor:
    shape, dtype = w.meta(node)
    parts = [w.cast(p, dtype) for p in parts if p.shape != (0,)]  # torch lets an empty 1-D tensor join anything
    dim = dim % len(shape)
    if len(parts) > 1:
        w.rowwise(shape[dim], "a concatenation")
    dropped = min(p.ndim - len(stored_shape(p.shape)) for p in parts)
    if dim < dropped:
        exprs, axis = [w.restored(p) for p in parts], dim
    else:
        # Parts may have dropped different numbers of unit dimensions: bring all to the same rank.
        rank = len(shape) - dropped
        exprs = [
            p.expr if len(stored_shape(p.shape)) == rank else w.emit(R.reshape(p.expr, w.prims(p.shape[dropped:]))) for p in parts
        ]
        axis = dim - dropped
    return w.like(node, R.concat(exprs, axis) if len(exprs) > 1 else exprs[0])


@converts("aten.stack")
def stack(w: Walker, node: torch.fx.Node, parts: list[Tensor], dim: int = 0) -> Tensor:
    shape, dtype = w.meta(node)
    dim = dim % len(shape)
    widened = [w.reshape(w.cast(p, dtype), (*p.shape[:dim], 1, *p.shape[dim:])) for p in parts]
    return cat(w, node, widened, dim)


def repeated(w: Walker, a: Tensor, dim: int, times: int, shape: tuple[Size, ...], whole: bool) -> Tensor:
    """``a`` repeated along a torch dimension: as a whole (a b a b) or each element in place (a a b b)."""
    wide = (*a.shape[: dim if whole else dim + 1], 1, *a.shape[dim if whole else dim + 1 :])
    target = tuple(times if i == (dim if whole else dim + 1) else s for i, s in enumerate(wide))
    lifted = w.emit(R.reshape(a.expr, w.prims(wide)))
    spread = w.emit(R.broadcast_to(lifted, w.prims(target)))
    return w.tensor(R.reshape(spread, w.prims(stored_shape(shape))), shape, a.dtype)


@converts("aten.repeat")
def repeat(w: Walker, node: torch.fx.Node, a: Tensor, repeats: list[int]) -> Tensor:
    a = w.reshape(a, (1,) * (len(repeats) - a.ndim) + a.shape)
    for dim, times in enumerate(repeats):
        if times == 1:
            continue
        if not isinstance(times, int):
            raise Refused("a repeat by the number of tokens")
        size = a.shape[dim]
        a = repeated(w, a, dim, times, (*a.shape[:dim], size * times, *a.shape[dim + 1 :]), whole=True)
    return a


@converts("aten.repeat_interleave")
def repeat_interleave(w: Walker, node: torch.fx.Node, a: Tensor, repeats: Any, dim: int | None = None, **_: Any) -> Tensor:
    if not isinstance(repeats, int) or dim is None:
        raise Refused("repeat_interleave with repeats that are not one number")
    return repeated(w, a, dim % a.ndim, repeats, w.meta(node)[0], whole=False)


@converts("aten.flip")
def flip(w: Walker, node: torch.fx.Node, a: Tensor, dims: list[int]) -> Tensor:
    expr = a.expr
    for dim in dims:
        w.rowwise(a.shape[dim], "a reversal")
        expr = w.emit(R.flip(expr, w.axis(a, dim)))
    return w.like(node, expr)


@converts("aten.tril", "aten.triu")
def triangle(w: Walker, node: torch.fx.Node, a: Tensor, diagonal: int = 0) -> Tensor:
    op = R.tril if "tril" in str(node.target) else R.triu
    return w.like(node, op(a.expr, diagonal))


@converts("aten.constant_pad_nd")
def constant_pad(w: Walker, node: torch.fx.Node, a: Tensor, widths: list[int], value: Any = 0.0) -> Tensor:
    """Constant padding; ``widths`` runs from the last dimension to the first, (before, after) each."""
    dims = [(widths[2 * i], widths[2 * i + 1]) for i in range(len(widths) // 2)]
    stored = stored_shape(a.shape)
    if len(dims) > len(stored) or any(not isinstance(v, int) or v < 0 for v in widths):
        raise Refused("padding that crops, or along the batch")
    for back, pair in enumerate(dims):
        if any(pair):
            w.rowwise(a.shape[-1 - back], "padding")
    flat = [0] * (2 * (len(stored) - len(dims))) + [v for pair in reversed(dims) for v in pair]
    return w.like(node, R.nn.pad(a.expr, flat, pad_value=float(value or 0.0)))


@converts("aten.pad")
def pad(w: Walker, node: torch.fx.Node, a: Tensor, widths: list[int], mode: str = "constant", value: Any = None) -> Tensor:
    if mode != "constant":
        raise Refused(f"padding in the mode {mode!r}")
    return constant_pad(w, node, a, widths, value)
