"""Reading shapes and constants of Relax expressions: small questions that several passes ask."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import tvm_ffi
from tvm import relax, tirx
from tvm.ir.expr import GenericConst
from tvm.sym.analyzer import Analyzer


def dims(expr: relax.Expr) -> list[Any]:
    """The shape of a tensor expression: ints where a dimension is known, else the symbolic expression."""
    return [plain(d) for d in expr.ty.shape]


def plain(dim: Any) -> Any:
    """A dimension as an int if it is one."""
    return int(dim.value) if isinstance(dim, tirx.IntImm) else dim


def first_result(var: relax.Var) -> relax.Expr:
    """``var``, or its first field if it is a tuple."""
    return relax.TupleGetItem(var, 0) if isinstance(var.ty, relax.TupleType) else var


def dtype_of(expr: relax.Expr) -> str:
    return str(expr.ty.dtype)


def same_dim(a: Any, b: Any) -> bool:
    """Whether two dimensions are provably equal."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(tvm_ffi.structural_equal(a, b)) or bool(Analyzer().can_prove_equal(a, b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def scalar(expr: relax.Expr) -> float | None:
    """The value of a scalar constant (shape ``[]``, or all ones), else None."""
    if not isinstance(expr, GenericConst) or prod(int(d) for d in expr.ty.shape) != 1:
        return None
    return float(expr.value.numpy().reshape(-1)[0]) if hasattr(expr.value, "numpy") else float(expr.value)


def axis_slice(call: relax.Call) -> tuple[int, int, int, int] | None:
    """``(axis, begin, end, step)`` of a ``strided_slice`` along one axis of known size, as non-negative numbers; else None."""
    axes, begin, end = ([plain(v) for v in call.args[i]] for i in (1, 2, 3))
    steps = [plain(v) for v in call.args[4]] if len(call.args) > 4 else [1]
    shape = dims(call.args[0])
    if len(axes) != 1 or not all(isinstance(v, int) for v in (*begin, *end, *steps)) or steps[0] < 1:
        return None
    axis = axes[0] % len(shape)
    size = shape[axis]
    if not isinstance(size, int):
        return None
    low, high, _ = slice(begin[0], end[0]).indices(size)
    return axis, low, high, steps[0]


def take_slice(x: relax.Expr, axis: int, begin: int, end: int, step: int = 1) -> relax.Expr:
    """``x[..., begin:end:step, ...]`` along ``axis``."""
    return relax.op.strided_slice(x, [axis], [begin], [end], [step])


def permutation(permute: relax.Call) -> list[int]:
    """The axes of a ``permute_dims``, counted from 0."""
    rank = len(dims(permute.args[0]))
    axes = permute.attrs.axes
    return list(range(rank))[::-1] if axes is None else [int(a) % rank for a in axes]
