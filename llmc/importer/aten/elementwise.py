"""Elementwise ops: arithmetic with torch's type promotion, comparisons, activations, casts, fills."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tvm import relax

from llmc.importer.aten.registry import converts
from llmc.importer.report import Refused
from llmc.importer.values import LENGTH, Size, Tensor, stored_shape
from llmc.importer.walker import Walker

R = relax.op
_TORCH = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16, "int32": torch.int32,
    "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_NAME = {v: k for k, v in _TORCH.items()}


def operand(w: Walker, value: Any, dtype: str) -> relax.Expr:
    """A tensor or a Python number as an expression of ``dtype``."""
    if isinstance(value, Tensor):
        return w.cast(value, dtype).expr
    if isinstance(value, bool | int | float):
        return w.constant(value, dtype)
    size = w.prim(value)
    if isinstance(size, int):
        return w.constant(size, dtype)
    raise Refused("arithmetic with the number of tokens")


def promoted(*values: Any) -> str:
    """The dtype torch computes a mix of tensors and numbers in: tensors decide, a zero-dimensional one only within its kind."""
    dummies = [torch.empty((1,) * min(v.ndim, 1), dtype=_TORCH[v.dtype]) if isinstance(v, Tensor) else v for v in values]
    dummies = [d if isinstance(d, torch.Tensor | int | float | bool) else 1 for d in dummies]
    result = dummies[0] if isinstance(dummies[0], torch.Tensor) else torch.tensor(dummies[0])
    dtype = result.dtype
    for other in dummies[1:]:
        dtype = torch.result_type(torch.empty((1,) * result.ndim, dtype=dtype), other)
    return _NAME.get(dtype, "int32")


def binary(w: Walker, node: torch.fx.Node, op: Callable[..., relax.Expr], a: Any, b: Any) -> Tensor:
    """``op(a, b)`` in the dtype torch gave the result."""
    dtype = w.meta(node)[1]
    return w.like(node, op(operand(w, a, dtype), operand(w, b, dtype)))


def _binary_converter(op: Callable[..., relax.Expr]) -> Callable[..., Tensor]:
    def convert(w: Walker, node: torch.fx.Node, a: Any, b: Any) -> Tensor:
        return binary(w, node, op, a, b)

    return convert


for _names, _op in {
    ("aten.mul", "aten.mul_"): R.multiply,
    ("aten.pow",): R.power,
    ("aten.maximum",): R.maximum,
    ("aten.minimum",): R.minimum,
    ("aten.bitwise_and", "aten.__and__"): R.bitwise_and,
    ("aten.bitwise_or", "aten.__or__"): R.bitwise_or,
    ("aten.bitwise_xor",): R.bitwise_xor,
}.items():
    converts(*_names)(_binary_converter(_op))


@converts("aten.add", "aten.sub")
def add_sub(w: Walker, node: torch.fx.Node, a: Any, b: Any, alpha: Any = 1) -> Tensor:
    op = R.add if str(node.target).startswith("aten.add") else R.subtract
    if alpha != 1:
        dtype = w.meta(node)[1]
        b = Tensor(w.emit(R.multiply(operand(w, b, dtype), operand(w, alpha, dtype))), b.shape, dtype)
    return binary(w, node, op, a, b)


@converts("aten.rsub")
def rsub(w: Walker, node: torch.fx.Node, a: Any, b: Any, alpha: Any = 1) -> Tensor:
    if alpha != 1:
        raise Refused("rsub with alpha")
    return binary(w, node, R.subtract, b, a)


@converts("aten.div")
def div(w: Walker, node: torch.fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode == "floor":
        return binary(w, node, R.floor_divide, a, b)
    if rounding_mode == "trunc":
        dtype = w.meta(node)[1]
        if dtype.startswith("float"):
            return w.like(node, R.trunc(w.emit(R.divide(operand(w, a, dtype), operand(w, b, dtype)))))
    return binary(w, node, R.divide, a, b)


@converts("aten.floor_divide")
def floor_divide(w: Walker, node: torch.fx.Node, a: Any, b: Any) -> Tensor:
    return binary(w, node, R.floor_divide, a, b)


@converts("aten.remainder")
def remainder(w: Walker, node: torch.fx.Node, a: Any, b: Any) -> Tensor:
    return binary(w, node, R.floor_mod, a, b)


@converts("aten.addcmul")
def addcmul(w: Walker, node: torch.fx.Node, a: Any, b: Any, c: Any, value: Any = 1) -> Tensor:
    dtype = w.meta(node)[1]
    product = w.emit(R.multiply(operand(w, b, dtype), operand(w, c, dtype)))
    if value != 1:
        product = w.emit(R.multiply(product, w.constant(value, dtype)))
    return w.like(node, R.add(operand(w, a, dtype), product))


@converts("aten.lerp")
def lerp(w: Walker, node: torch.fx.Node, a: Tensor, b: Tensor, weight: Any) -> Tensor:
    dtype = w.meta(node)[1]
    step = w.emit(R.multiply(w.emit(R.subtract(operand(w, b, dtype), operand(w, a, dtype))), operand(w, weight, dtype)))
    return w.like(node, R.add(operand(w, a, dtype), step))


def _compare_converter(op: Callable[..., relax.Expr]) -> Callable[..., Tensor]:
    def convert(w: Walker, node: torch.fx.Node, a: Any, b: Any) -> Tensor:
        dtype = promoted(a, b)
        return w.like(node, op(operand(w, a, dtype), operand(w, b, dtype)))

    return convert


for _name, _op in {
    "aten.eq": R.equal, "aten.ne": R.not_equal, "aten.lt": R.less, "aten.le": R.less_equal, "aten.gt": R.greater,
    "aten.ge": R.greater_equal,
}.items():  # fmt: skip
    converts(_name)(_compare_converter(_op))


@converts("aten.logical_and", "aten.logical_or")
def logical(w: Walker, node: torch.fx.Node, a: Any, b: Any) -> Tensor:
    op = R.logical_and if "and" in str(node.target) else R.logical_or
    return w.like(node, op(operand(w, a, "bool"), operand(w, b, "bool")))


@converts("aten.logical_not", "aten.bitwise_not")
def logical_not(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    if a.dtype != "bool":
        raise Refused("a bitwise complement of numbers")
    return w.like(node, R.logical_not(a.expr))


# --- one operand -----------------------------------------------------------------------------------------------------


def unary(w: Walker, node: torch.fx.Node, op: Callable[[relax.Expr], relax.Expr], a: Tensor) -> Tensor:
    dtype = w.meta(node)[1]
    return w.like(node, op(w.cast(a, dtype).expr))


def _unary_converter(op: Callable[[relax.Expr], relax.Expr]) -> Callable[..., Tensor]:
    return lambda w, node, a: unary(w, node, op, a)


for _name, _op in {
    "aten.neg": R.negative, "aten.abs": R.abs, "aten.exp": R.exp, "aten.log": R.log, "aten.sqrt": R.sqrt, "aten.rsqrt": R.rsqrt,
    "aten.sin": R.sin, "aten.cos": R.cos, "aten.tanh": R.tanh, "aten.sigmoid": R.sigmoid, "aten.erf": R.erf, "aten.floor": R.floor,
    "aten.ceil": R.ceil, "aten.round": R.round, "aten.sign": R.sign, "aten.square": R.square, "aten.silu": R.nn.silu,
    "aten.relu": R.nn.relu,
}.items():  # fmt: skip
    converts(_name)(_unary_converter(_op))


@converts("aten.gelu")
def gelu(w: Walker, node: torch.fx.Node, a: Tensor, approximate: str = "none") -> Tensor:
    return unary(w, node, R.nn.gelu_tanh if approximate == "tanh" else R.nn.gelu, a)


def _number(w: Walker, a: Tensor, value: float) -> relax.Expr:
    return w.constant(value, a.dtype)


@converts("aten.reciprocal")
def reciprocal(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    return w.like(node, R.divide(_number(w, a, 1.0), a.expr))


@converts("aten.expm1")
def expm1(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    return w.like(node, R.subtract(w.emit(R.exp(a.expr)), _number(w, a, 1.0)))


@converts("aten.log1p")
def log1p(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    return w.like(node, R.log(w.emit(R.add(a.expr, _number(w, a, 1.0)))))


def softplus_of(w: Walker, a: Tensor) -> relax.Expr:
    """log(1 + exp(a)), written so that it overflows for no a: max(a, 0) + log(1 + exp(-|a|))."""
    small = w.emit(R.exp(w.emit(R.negative(w.emit(R.abs(a.expr))))))
    tail = w.emit(R.log(w.emit(R.add(small, _number(w, a, 1.0)))))
    return w.emit(R.add(w.emit(R.nn.relu(a.expr)), tail))


@converts("aten.softplus")
def softplus(w: Walker, node: torch.fx.Node, a: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    if beta != 1:
        raise Refused("softplus with beta")
    return w.like(node, softplus_of(w, a))


@converts("aten.log_sigmoid")
def log_sigmoid(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    flipped = Tensor(w.emit(R.negative(a.expr)), a.shape, a.dtype)
    return w.like(node, R.negative(softplus_of(w, flipped)))


@converts("aten.mish")
def mish(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    return w.like(node, R.multiply(a.expr, w.emit(R.tanh(softplus_of(w, a)))))


@converts("aten.leaky_relu")
def leaky_relu(w: Walker, node: torch.fx.Node, a: Tensor, negative_slope: float = 0.01) -> Tensor:
    return w.like(node, R.nn.leakyrelu(a.expr, negative_slope))


def clamped(w: Walker, a: Tensor, low: Any, high: Any) -> relax.Expr:
    expr = a.expr
    if low is not None:
        expr = w.emit(R.maximum(expr, operand(w, low, a.dtype)))
    if high is not None:
        expr = w.emit(R.minimum(expr, operand(w, high, a.dtype)))
    return expr


@converts("aten.clamp", "aten.clip", "aten.hardtanh")
def clamp(w: Walker, node: torch.fx.Node, a: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if str(node.target).startswith("aten.hardtanh"):
        min, max = (-1.0 if min is None else min), (1.0 if max is None else max)
    return w.like(node, clamped(w, a, min, max))


@converts("aten.clamp_min", "aten.clamp_max")
def clamp_one(w: Walker, node: torch.fx.Node, a: Tensor, bound: Any) -> Tensor:
    low = "clamp_min" in str(node.target)
    return w.like(node, clamped(w, a, bound if low else None, None if low else bound))


@converts("aten.relu6")
def relu6(w: Walker, node: torch.fx.Node, a: Tensor) -> Tensor:
    return w.like(node, clamped(w, a, 0.0, 6.0))


# --- the same value under another name, cast or not -------------------------------------------------------------------


@converts(
    "aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.detach_", "aten.dropout", "aten.lift_fresh_copy",
    "aten.lift_fresh", "aten._to_copy", "aten.to", "aten.type_as", "aten.copy", "aten.float", "aten.native_dropout",
)  # fmt: skip
def identity(w: Walker, node: torch.fx.Node, a: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """The value itself in the dtype torch gave the result. ``copy(a, b)`` is b in a's shape."""
    dtype = w.meta(node)[1]
    if str(node.target).startswith("aten.copy"):
        (source,) = rest[:1]
        return broadcast(w, w.cast(source, dtype), w.meta(node)[0])
    return w.cast(a, dtype)


def broadcast(w: Walker, a: Tensor, shape: tuple[Size, ...]) -> Tensor:
    """``a`` expanded to a torch shape."""
    if stored_shape(shape) == stored_shape(a.shape):
        return Tensor(a.expr, shape, a.dtype)
    return w.tensor(R.broadcast_to(a.expr, w.prims(stored_shape(shape))), shape, a.dtype)


@converts("aten.where")
def where(w: Walker, node: torch.fx.Node, condition: Tensor, a: Any, b: Any) -> Tensor:
    dtype = w.meta(node)[1]
    return w.like(node, R.where(condition.expr, operand(w, a, dtype), operand(w, b, dtype)))


@converts("aten.masked_fill")
def masked_fill(w: Walker, node: torch.fx.Node, a: Tensor, mask: Tensor, value: Any) -> Tensor:
    dtype = w.meta(node)[1]
    return w.like(node, R.where(mask.expr, operand(w, value, dtype), a.expr))


# --- fills -----------------------------------------------------------------------------------------------------------


def filled(w: Walker, node: torch.fx.Node, value: float | int | bool) -> Tensor:
    shape, dtype = w.meta(node)
    if isinstance(value, float) and not math.isfinite(value) and not dtype.startswith(("float", "bfloat")):
        raise Refused(f"{value} in a tensor of {dtype}")
    return Tensor(spread(w, value, shape, dtype), shape, dtype)


def spread(w: Walker, value: float | int | bool, shape: tuple[Size, ...], dtype: str) -> relax.Expr:
    """A number as a tensor of a torch shape. (Not ``relax.full``: TVM 0.27 cannot legalise it for an infinite value.)"""
    constant = w.constant(value, dtype)
    return constant if shape == () else w.emit(R.broadcast_to(constant, w.prims(stored_shape(shape))))


@converts("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.empty", "aten.empty_like", "aten.new_empty")
def zeros(w: Walker, node: torch.fx.Node, *_: Any, **__: Any) -> Tensor:
    """Uninitialised tensors become zeros: what is read from them has been written before."""
    return filled(w, node, 0)


@converts("aten.ones", "aten.ones_like", "aten.new_ones")
def ones(w: Walker, node: torch.fx.Node, *_: Any, **__: Any) -> Tensor:
    return filled(w, node, 1)


@converts("aten.full", "aten.full_like", "aten.new_full")
def full(w: Walker, node: torch.fx.Node, _: Any, value: Any, *__: Any, **___: Any) -> Tensor:
    if isinstance(value, bool | int | float):
        return filled(w, node, value)
    raise Refused("a fill with a value that is not a number")


@converts("aten.scalar_tensor")
def scalar_tensor(w: Walker, node: torch.fx.Node, value: Any, *_: Any, **__: Any) -> Tensor:
    return filled(w, node, value)


@converts("aten.arange")
def arange(w: Walker, node: torch.fx.Node, *bounds: Any, **_: Any) -> Tensor:
    dtype = w.meta(node)[1]
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    if (start, end, step) == (0, LENGTH, 1):
        # The index of a token in its sequence is its position: in the exported graph there is one sequence, from 0.
        return w.cast(Tensor(w.positions, w.meta(node)[0], "int32"), dtype)
    for bound in (start, end, step):
        w.rowwise(bound if isinstance(bound, float | int) else LENGTH, "a range of indices")
    return w.like(node, R.arange(start, end, step, dtype=dtype))
