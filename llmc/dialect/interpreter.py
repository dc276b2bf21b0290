"""A NumPy interpreter of flat graphs: the independent reference that passes and importers are checked against.

Every float is float64 and every integer int64, so what a pass may change is only the order of operations. Relax operators go
through the table ``OPS``, dialect operators through their references. In-place state: ``llmc.append`` returns a new array, and
``pages`` holds the last pages of every page parameter.

Calibration (:mod:`llmc.passes.quantize.forward`) runs graphs with it too, in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from llmc.dialect import attrs_of
from llmc.dialect.attention import reference as attention_reference
from llmc.dialect.linear import ACTIVATIONS
from llmc.dialect.linear import reference as linear_reference
from llmc.dialect.moe import reference as moe_reference
from llmc.dialect.norm import layer_norm_reference, rms_norm_reference
from llmc.dialect.norm_linear import linear_op as norm_linear_op
from llmc.dialect.paged import append_reference, attend_reference
from llmc.dialect.rope import reference as rope_reference
from llmc.dialect.rope_append import reference as rope_append_reference
from llmc.dialect.rope_attend import reference as rope_attend_reference
from llmc.dialect.row_starts import reference as row_starts_reference
from llmc.dialect.topk import reference as topk_reference

Table = dict[str, Callable[..., Any]]


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x)


def _cast(x: Any, dtype: str, floats: type = np.float64) -> np.ndarray:
    if dtype == "bool":
        return np.asarray(x).astype(np.bool_)
    if dtype.startswith(("int", "uint")):
        return np.trunc(x).astype(np.int64) if np.asarray(x).dtype.kind == "f" else np.asarray(x).astype(np.int64)
    return np.asarray(x).astype(floats, copy=False)


def _axes(attr: Any) -> tuple[int, ...] | None:
    return None if attr is None else tuple(int(a) for a in attr)


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, x: function(x, axis=_axes(a.axis), keepdims=bool(a.keepdims))


def _split(a: Any, x: np.ndarray) -> tuple[np.ndarray, ...]:
    where = a.indices_or_sections
    parts = int(where) if isinstance(where, tirx.IntImm | int) else [int(i) for i in where]
    return tuple(np.split(x, parts, axis=int(a.axis)))


def _strided_slice(a: Any, x: np.ndarray, axes: Any, begin: Any, end: Any, strides: Any = None) -> np.ndarray:
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        step = 1 if strides is None else int(strides[i])
        index[int(axis)] = slice(int(begin[i]), min(int(end[i]), x.shape[int(axis)]), step)
    return x[tuple(index)]


def _topk(a: Any, x: np.ndarray) -> Any:
    axis, k = int(a.axis), int(a.k)
    order = np.argsort(-x if a.largest else x, axis=axis, kind="stable")
    ids = np.take(order, np.arange(k if k > 0 else x.shape[axis]), axis=axis)
    values = np.take_along_axis(x, ids, axis=axis)
    return {"both": (values, ids), "values": values, "indices": ids}[str(a.ret_type)]


def _softmax(a: Any, x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=int(a.axis), keepdims=True))
    return e / e.sum(axis=int(a.axis), keepdims=True)


def _scatter_elements(a: Any, data: np.ndarray, ids: np.ndarray, updates: np.ndarray) -> np.ndarray:
    out, axis = data.copy(), int(a.axis)
    where: list[Any] = list(np.indices(ids.shape))
    where[axis] = ids
    if str(a.reduction) == "add":
        np.add.at(out, tuple(where), updates)
    else:
        out[tuple(where)] = updates
    return out


def _scatter_nd(a: Any, data: np.ndarray, ids: np.ndarray, updates: np.ndarray) -> np.ndarray:
    out, where = data.copy(), tuple(np.moveaxis(ids, -1, 0))
    if str(a.reduction) == "add":
        np.add.at(out, where, updates)
    else:
        out[where] = updates
    return out


def _one_hot(a: Any, ids: np.ndarray, on: Any, off: Any) -> np.ndarray:
    hot = np.where(np.arange(int(a.depth)) == ids[..., None], float(on), float(off))
    return np.moveaxis(hot, -1, int(a.axis)) if int(a.axis) != -1 else hot


def _sort(a: Any, x: np.ndarray) -> np.ndarray:
    out = np.sort(x, axis=int(a.axis))
    return np.flip(out, int(a.axis)) if a.descending else out


def _argsort(a: Any, x: np.ndarray) -> np.ndarray:
    return np.argsort(-x if a.descending else x, axis=int(a.axis), kind="stable")


def _cumsum(a: Any, x: np.ndarray) -> np.ndarray:
    out = np.cumsum(x, axis=None if a.axis is None else int(a.axis), dtype=np.int64 if x.dtype.kind in "bi" else None)
    return out - x if a.exclusive else out


def _matmul(_: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x @ y


def _layer_norm(a: Any, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    axes = _axes(a.axes)
    centred = x - x.mean(axis=axes, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + float(a.epsilon))
    return y * (gamma if a.scale else 1) + (beta if a.center else 0)


def _rms_norm(a: Any, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=_axes(a.axes), keepdims=True) + float(a.epsilon)) * weight


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _pad(a: Any, x: np.ndarray) -> np.ndarray:
    widths = [int(w) for w in a.pad_width]
    return np.pad(x, list(zip(widths[0::2], widths[1::2], strict=True)), constant_values=float(a.pad_value))


def _pure(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args: function(*args)


SAME_NAME = (
    "abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "ceil", "cos", "cosh", "divide", "equal", "exp", "floor",
    "floor_divide", "greater", "greater_equal", "isfinite", "isinf", "isnan", "left_shift", "less", "less_equal", "log",
    "logical_and", "logical_not", "logical_or", "logical_xor", "maximum", "minimum", "multiply", "negative", "not_equal", "power",
    "right_shift", "sign", "sin", "sinh", "sqrt", "square", "subtract", "tan", "tanh", "trunc", "where",
)  # fmt: skip
"""Relax operators whose NumPy function has the same name and meaning."""

OPS: Table = {
    **{f"relax.{name}": _pure(getattr(np, name)) for name in SAME_NAME},
    "relax.floor_mod": _pure(np.mod), "relax.mod": _pure(np.fmod), "relax.round": _pure(np.round),
    "relax.rsqrt": _pure(lambda x: 1 / np.sqrt(x)), "relax.erf": _pure(_erf), "relax.sigmoid": _pure(_sigmoid),
    "relax.clip": _pure(lambda x, low, high: np.clip(x, float(low), float(high))),
    "relax.nn.relu": _pure(lambda x: np.maximum(x, 0)),
    "relax.nn.leakyrelu": lambda a, x: np.where(x > 0, x, float(a.alpha) * x),
    "relax.nn.silu": _pure(ACTIVATIONS["silu"]), "relax.nn.gelu": _pure(ACTIVATIONS["gelu"]),
    "relax.nn.gelu_tanh": _pure(ACTIVATIONS["gelu_tanh"]),
    "relax.nn.softplus": lambda a, x: np.log1p(np.exp(float(a.beta) * x)) / float(a.beta),
    "relax.nn.softmax": _softmax, "relax.nn.log_softmax": lambda a, x: np.log(_softmax(a, x)),
    "relax.nn.layer_norm": _layer_norm, "relax.nn.rms_norm": _rms_norm, "relax.nn.dropout": lambda _, x: (x, np.ones_like(x)),
    "relax.sum": _reduce(np.sum), "relax.mean": _reduce(np.mean), "relax.max": _reduce(np.max), "relax.min": _reduce(np.min),
    "relax.prod": _reduce(np.prod), "relax.variance": _reduce(np.var), "relax.std": _reduce(np.std),
    "relax.argmax": lambda a, x: np.argmax(x, axis=None if a.axis is None else int(a.axis), keepdims=bool(a.keepdims)),
    "relax.argmin": lambda a, x: np.argmin(x, axis=None if a.axis is None else int(a.axis), keepdims=bool(a.keepdims)),
    "relax.cumsum": _cumsum, "relax.matmul": _matmul,
    "relax.reshape": _pure(np.reshape), "relax.flatten": _pure(np.ravel), "relax.broadcast_to": _pure(np.broadcast_to),
    "relax.permute_dims": lambda a, x: np.transpose(x, _axes(a.axes)),
    "relax.expand_dims": lambda a, x: np.expand_dims(x, _axes(a.axis) or ()),
    "relax.squeeze": lambda a, x: np.squeeze(x, _axes(a.axis)),
    "relax.concat": lambda a, xs: np.concatenate(xs, axis=int(a.axis)),
    "relax.stack": lambda a, xs: np.stack(xs, axis=int(a.axis)),
    "relax.split": _split, "relax.strided_slice": _strided_slice,
    "relax.take": lambda a, x, ids: np.take(x, ids, axis=None if a.axis is None else int(a.axis)),
    "relax.gather_elements": lambda a, x, ids: np.take_along_axis(x, ids, axis=int(a.axis)),
    "relax.gather_nd": lambda a, x, ids: x[tuple(np.moveaxis(ids, -1, 0))],
    "relax.scatter_elements": _scatter_elements, "relax.scatter_nd": _scatter_nd,
    "relax.repeat": lambda a, x: np.repeat(x, int(a.repeats), axis=None if a.axis is None else int(a.axis)),
    "relax.tile": lambda a, x: np.tile(x, _axes(a.repeats) or ()), "relax.flip": lambda a, x: np.flip(x, int(a.axis)),
    "relax.one_hot": _one_hot,
    "relax.topk": _topk, "relax.sort": _sort, "relax.argsort": _argsort,
    "relax.nn.pad": _pad,
    "relax.tril": _pure(np.tril), "relax.triu": _pure(np.triu),
    "relax.einsum": lambda a, xs: np.einsum(str(a.subscripts), *xs), "relax.outer": _pure(np.outer),
    "relax.zeros_like": _pure(np.zeros_like), "relax.ones_like": _pure(np.ones_like),
    "relax.full_like": lambda a, x, v: np.full_like(x, v),
    "llmc.rope": rope_reference, "llmc.rope_append": rope_append_reference,
    "llmc.rope_attend": rope_attend_reference, "llmc.row_starts": row_starts_reference,
    "llmc.rms_norm": rms_norm_reference, "llmc.layer_norm": layer_norm_reference,
}  # fmt: skip


def _linear(x: Any, weight: Any, *rest: Any, bias: int, residual: int, activation: str, out_dtype: str = "") -> np.ndarray:
    extra = list(rest)
    b = extra.pop(0) if bias else None
    return linear_reference(x, weight, b, extra.pop(0) if residual else None, activation=activation)


def _norm_linear(x: Any, *rest: Any, eps: float, **attrs: Any) -> np.ndarray:
    normal = rms_norm_reference(x, np.ones(x.shape[-1]), eps=eps)
    found: np.ndarray = OPS[norm_linear_op(attrs)](normal, *rest, **attrs)
    return found


def _attention(*args: Any, layer: int, sinks: int, **attrs: Any) -> np.ndarray:
    return attention_reference(*args, **attrs)


def _attend(*args: Any, sinks: int, **attrs: Any) -> np.ndarray:
    return attend_reference(*args, **attrs)


def _moe(*args: Any, top_k: int, bias: int, **attrs: Any) -> np.ndarray:
    return moe_reference(*args, **attrs)


OPS["llmc.linear"], OPS["llmc.attention"], OPS["llmc.attend"], OPS["llmc.moe"] = _linear, _attention, _attend, _moe
OPS["llmc.append"], OPS["llmc.topk"], OPS["llmc.norm_linear"] = append_reference, topk_reference, _norm_linear


_ARITHMETIC: list[tuple[Any, Callable[[int, int], int]]] = [
    (tirx.Add, operator.add), (tirx.Sub, operator.sub), (tirx.Mul, operator.mul), (tirx.FloorDiv, operator.floordiv),
    (tirx.FloorMod, operator.mod), (tirx.Max, max), (tirx.Min, min),
]  # fmt: skip


def evaluate(expr: Any, symbols: Mapping[Any, int]) -> int:
    """The number that a shape expression stands for."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    if isinstance(expr, tirx.Var):
        return symbols[expr]
    for kind, function in _ARITHMETIC:
        if isinstance(expr, kind):
            return function(evaluate(expr.a, symbols), evaluate(expr.b, symbols))
    raise TypeError(f"cannot evaluate the shape expression {expr}")


class Interpreter:
    """Runs one Relax function of dataflow bindings; ``values`` holds every variable's array afterwards."""

    FLOATS: type = np.float64
    """What floats of every width are computed in."""

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.values: dict[Any, Any] = {}
        self.symbols: dict[Any, int] = {}
        self.pages: dict[str, np.ndarray] = {}
        self._page_of: dict[Any, str] = {}

    def run(self, arguments: Sequence[np.ndarray]) -> np.ndarray:
        """The result for ``arguments``, in the order of the parameters. Shapes bind the symbolic dimensions."""
        if len(arguments) != len(self.function.params):
            raise ValueError(f"{len(self.function.params)} parameters, {len(arguments)} arguments")
        given = [(var, np.asarray(value)) for var, value in zip(self.function.params, arguments, strict=True)]
        for var, value in given:
            self._bind_symbols(var, value)
        for var, value in given:
            self._bind_parameter(var, value)
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._checked(binding.var, self._eval(binding.value))
                self._track_pages(binding.var, binding.value)
        return self._eval(self.function.body.body)

    def cast(self, x: Any, dtype: str) -> np.ndarray:
        """``x`` as a value of ``dtype``, in the width that this interpreter computes in."""
        return _cast(x, dtype, self.FLOATS)

    def _bind_symbols(self, var: Any, value: np.ndarray) -> None:
        for dim, size in zip(var.ty.shape, value.shape, strict=True):
            if isinstance(dim, tirx.Var) and self.symbols.setdefault(dim, size) != size:
                raise ValueError(f"{var.name}: {dim} is {self.symbols[dim]} and {size}")

    def _bind_parameter(self, var: Any, value: np.ndarray) -> None:
        expected = tuple(evaluate(d, self.symbols) for d in var.ty.shape)
        if expected != value.shape:
            raise ValueError(f"{var.name}: expected {expected}, found {value.shape}")
        self.values[var] = self.cast(value, str(var.ty.dtype))
        self._page_of[var] = var.name

    def _track_pages(self, var: Any, value: Any) -> None:
        name = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
        if name == "llmc.append":
            self._page_of[var] = page = self._page_of[value.args[3]]
            self.pages[page] = self.values[var]
        elif name in ("llmc.rope_append", "llmc.rope_attend"):
            self._page_of[var] = page = self._page_of[value.args[4]]
            self.pages[page] = self.values[var][1]
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in self._page_of:
            self._page_of[var] = self._page_of[value.tuple_value]

    def _checked(self, var: Any, value: Any) -> Any:
        """``value``, after comparing its shape with the type that the graph gives it: type rules are tested this way."""
        if isinstance(var.ty, relax.TensorType):
            expected = tuple(evaluate(d, self.symbols) for d in var.ty.shape)
            if tuple(np.shape(value)) != expected:
                raise ValueError(f"{var.name}: type says {expected}, value is {np.shape(value)}")
        return value

    def _eval(self, expr: Any) -> Any:
        if isinstance(expr, GenericConst):
            return self.cast(expr.value.numpy() if hasattr(expr.value, "numpy") else expr.value, str(expr.ty.dtype))
        if isinstance(expr, relax.ShapeExpr):
            return tuple(evaluate(d, self.symbols) for d in expr)
        if isinstance(expr, tirx.IntImm | tirx.FloatImm):
            return expr.value
        if isinstance(expr, relax.Call):
            return self._call(expr)
        if isinstance(expr, relax.TupleGetItem):
            return self._eval(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.Tuple):
            return tuple(self._eval(f) for f in expr.fields)
        return self.values[expr] if expr in self.values else evaluate(expr, self.symbols)

    def _call(self, call: relax.Call) -> Any:
        name = call.op.name
        args = [self._eval(a) for a in call.args]
        if name.startswith("llmc."):
            return OPS[name](*args, **attrs_of(call))
        if name == "relax.astype":
            return self.cast(args[0], str(call.attrs.dtype))
        if name == "relax.arange":
            return self.cast(np.arange(*args), str(call.attrs.dtype))
        if name in ("relax.full", "relax.zeros", "relax.ones"):
            fill = {"relax.zeros": 0, "relax.ones": 1}.get(name)
            return np.full(args[0], args[1] if fill is None else fill, self.FLOATS if fill is not None else None)
        if name not in OPS:
            raise KeyError(f"the interpreter has no {name}")
        return OPS[name](call.attrs, *args)


def run(module: tvm.IRModule, arguments: Sequence[np.ndarray], name: str = "main") -> np.ndarray:
    """The float64 result of function ``name`` for ``arguments``."""
    return Interpreter(module[name]).run(arguments)
