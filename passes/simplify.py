"""Identity operations, layout operations that cancel, common subexpressions and dead code.

before::                                        after::

    a = reshape(x, [n, 4, 6])                       a = reshape(x, [n, 24])
    b = reshape(a, [n, 24])                         f(x, cos(p), cos(p)) with one cos
    c = multiply(permute(permute(b)), 1)
    f(c, cos(p), cos(p)), g never used

Canonical forms that later passes rely on: ``expand_dims``, ``squeeze``, ``flatten`` and permutations that move only unit
dimensions are ``reshape``; parts of a ``split`` are ``strided_slice``; ``llmc.linear`` reads a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import relax, tirx
from tvm.relax import op

from llmc.dialect.core import attrs_of, call
from llmc.importer.params import ParamTable
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import axis_slice, dims, dtype_of, permutation, plain, same_shape, scalar, take_slice

NEUTRAL = {
    "relax.add": (0.0, True),  # x + 0 = 0 + x = x
    "relax.subtract": (0.0, False),  # x - 0 = x
    "relax.multiply": (1.0, True),  # x · 1 = 1 · x = x
    "relax.divide": (1.0, False),  # x / 1 = x
    "relax.power": (1.0, False),  # x ^ 1 = x
}
"""Operator -> its neutral right operand, and whether it may stand on the left too."""

Simplification = Callable[[Rewriter, relax.Var, relax.Call], "relax.Expr | None"]


def simplify(graph: Graph, params: ParamTable) -> None:
    """Apply the rules of this module to ``graph`` in one walk; weights that are then unused leave ``params``."""
    seen: dict[int, list[tuple[relax.Expr, relax.Var]]] = {}

    def rule(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        new = _simplified(work, var, value)
        if isinstance(new, relax.Var):
            return new
        final = value if new is None else work.normal(new)
        bucket = seen.setdefault(tvm_ffi.structural_hash(final), [])
        for other, holder in bucket:
            if op_name(final) != "llmc.append" and tvm_ffi.structural_equal(final, other):
                return holder
        if new is not None:
            holder = work.emit(final, var.name)
            bucket.append((final, holder))
            return holder
        bucket.append((final, var))
        return None

    rewrite(graph, rule)
    graph.remove_unused_params(params)


def _simplified(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if isinstance(value, relax.TupleGetItem):
        return _part_of_split(work, value)
    if not isinstance(value, relax.Call):
        return None
    name = op_name(value)
    if name in NEUTRAL:
        kept = _without_neutral(name, value, var)
        if kept is not None:
            return kept
    return _RULES[name](work, var, value) if name in _RULES else None


def _same_type(a: relax.Expr, b: relax.Expr) -> bool:
    return dtype_of(a) == dtype_of(b) and same_shape(dims(a), dims(b))


def _without_neutral(name: str, value: relax.Call, var: relax.Var) -> relax.Expr | None:
    neutral, commutes = NEUTRAL[name]
    left, right = value.args
    if isinstance(left, relax.Var) and scalar(right) == neutral and _same_type(left, var):
        return left
    if commutes and isinstance(right, relax.Var) and scalar(left) == neutral and _same_type(right, var):
        return right
    return None


def _reshaped(work: Rewriter, x: relax.Expr, var: relax.Var) -> tuple[relax.Expr, bool]:
    """The tensor behind a chain of reshapes that ends in ``x``, and whether it already has the shape of ``var``."""
    inner = work.value(x, "relax.reshape")
    while inner is not None:
        x, inner = inner.args[0], work.value(inner.args[0], "relax.reshape")
    return x, same_shape(dims(x), dims(var))


def _reshape(work: Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    x, done = _reshaped(work, value.args[0], var)
    if done:
        return x
    canonical = op_name(value) == "relax.reshape" and x.same_as(value.args[0])
    return None if canonical else op.reshape(x, var.ty.shape)


def compose_permutes(work: Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    """A permutation of permutations as one of the source, as a reshape, or as nothing at all."""
    x, axes = value.args[0], permutation(value)
    inner = work.value(x, "relax.permute_dims")
    while inner is not None:
        first = permutation(inner)
        x, axes = inner.args[0], [first[a] for a in axes]
        inner = work.value(x, "relax.permute_dims")
    if axes == list(range(len(axes))):
        return x
    shape = dims(x)
    moved = [a for a in axes if shape[a] != 1]
    if moved == sorted(moved):  # only unit dimensions change place: the data stays where it is
        x, done = _reshaped(work, x, var)
        return x if done else op.reshape(x, var.ty.shape)
    return None if x.same_as(value.args[0]) else op.permute_dims(x, axes)


def _same_as_operand(_: Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    x = value.args[0]
    return x if isinstance(x, relax.Var) and _same_type(x, var) else None


def _slice(work: Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    x = value.args[0]
    if _same_type(x, var) and axis_slice(value) is not None:
        return x
    here = axis_slice(value)
    inner = work.value(x, "relax.strided_slice")
    before = None if inner is None else axis_slice(inner)
    if here is None or before is None or here[0] != before[0] or before[3] != 1:
        return None
    axis, begin, end, step = here
    return take_slice(inner.args[0], axis, before[1] + begin, before[1] + end, step)


def _part_of_split(work: Rewriter, value: relax.TupleGetItem) -> relax.Expr | None:
    """``split(x)[i]`` -> ``strided_slice(x)``, which fuses into what reads it; a tuple of results does not."""
    source = work.value(value.tuple_value)
    if isinstance(source, relax.Tuple):
        return source.fields[value.index]
    if op_name(source) != "relax.split":
        return None
    x = source.args[0]
    shape = dims(x)
    axis = int(source.attrs.axis) % len(shape)
    size, where = shape[axis], source.attrs.indices_or_sections
    if not isinstance(size, int):
        return None
    if isinstance(where, tirx.IntImm | int):
        width = -(-size // int(where))
        edges = [min(i * width, size) for i in range(int(where) + 1)]
    else:
        edges = [0, *(int(plain(i)) for i in where), size]
    return take_slice(x, axis, edges[value.index], edges[value.index + 1])


def _concat(_: Rewriter, __: relax.Var, value: relax.Call) -> relax.Expr | None:
    parts = value.args[0]
    return parts.fields[0] if isinstance(parts, relax.Tuple) and len(parts.fields) == 1 else None


def _linear(work: Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    """``llmc.linear`` of ``[..., k]`` -> of ``[rows, k]``, with reshapes around it."""
    x, attrs = value.args[0], attrs_of(value)
    shape = dims(x)
    if len(shape) == 2:
        return None
    rows: Any = 1
    for d in shape[:-1]:
        rows = rows * d
    args = list(value.args)
    args[0] = work.emit(op.reshape(x, [rows, shape[-1]]))
    if attrs["residual"]:
        args[-1] = work.emit(op.reshape(args[-1], [rows, dims(var)[-1]]))
    return op.reshape(work.emit(call("llmc.linear", *args, **attrs)), var.ty.shape)


def _take(_: Rewriter, __: relax.Var, value: relax.Call) -> relax.Expr | None:
    """Indices are clipped: the "fast" mode reads outside the table for an index that is out of range."""
    if str(value.attrs.mode) != "fast":
        return None
    return op.take(value.args[0], value.args[1], axis=value.attrs.axis, mode="clip")


def _rope(work: Rewriter, _: relax.Var, value: relax.Call) -> relax.Expr | None:
    """Angles that were narrowed for a narrow ``x`` are read as they were computed: the kernel turns in float32."""
    x, *tables = value.args
    casts = [work.value(t, "relax.astype") for t in tables]
    if any(c is None or dtype_of(c.args[0]) != "float32" for c in casts):
        return None
    return relax.Call(value.op, [x, *(c.args[0] for c in casts)], value.attrs)


_RULES: dict[str, Simplification] = {
    "relax.reshape": _reshape,
    "relax.expand_dims": _reshape,
    "relax.squeeze": _reshape,
    "relax.flatten": _reshape,
    "relax.permute_dims": compose_permutes,
    "relax.astype": _same_as_operand,
    "relax.broadcast_to": _same_as_operand,
    "relax.strided_slice": _slice,
    "relax.concat": _concat,
    "relax.take": _take,
    "llmc.linear": _linear,
    "llmc.rope": _rope,
}
