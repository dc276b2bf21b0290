"""Normalisation written as arithmetic -> ``llmc.rms_norm`` and ``llmc.layer_norm``.

before::                                                 after::

    r = rsqrt(add(mean(power(x, 2), -1), eps))               y = llmc.rms_norm(x, w, eps, offset=1)
    y = multiply(multiply(x, r), add(1, w))                  z = llmc.layer_norm(x, g, b, eps)
    z = relax.nn.layer_norm(x, g, b, axes=[-1])

Found in any order of the operands, with ``x * x`` or ``square(x)`` for the power, ``1 / sqrt`` or a division for the inverse
square root, and with the weight multiplied on either side of it. A norm without weight reads a parameter of ones, which is the
only thing this pass adds to the table. A norm of ``x - mean(x)`` is a layer norm without bias (a parameter of zeros).
A norm that is computed in float32 between two casts reads and writes the narrow type itself: the kernels' statistics are float32.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.norm import layer_norm, rms_norm
from llmc.importer.params import Constant, ParamTable
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dims, dtype_of, same_dim, scalar


def ones_name(size: int) -> str:
    """The name of the parameter of ``size`` ones."""
    return f"llmc.ones.{size}"


def is_ones(expr: relax.Expr) -> bool:
    """Whether ``expr`` is a parameter of ones."""
    return isinstance(expr, relax.Var) and expr.name.startswith("llmc.ones.")


class _Norms:
    """The rules, and the constant parameters they need."""

    def __init__(self, graph: Graph, params: ParamTable) -> None:
        self.graph = graph
        self.params = params
        self.constants: dict[str, relax.Var] = {p.name: p for p in graph.params}

    def constant(self, value: float, size: int) -> relax.Var:
        """A parameter ``[size]`` float32 whose elements are all ``value``."""
        name = ones_name(size) if value else f"llmc.zeros.{size}"
        if name not in self.constants:
            self.params.add(name, Constant(np.full(size, value, np.float32), name))
            self.constants[name] = relax.Var(name, TensorType([size], "float32"))
            self.graph.params.append(self.constants[name])
        return self.constants[name]

    def is_constant(self, expr: relax.Expr, value: float) -> bool:
        return is_ones(expr) if value else isinstance(expr, relax.Var) and expr.name.startswith("llmc.zeros.")

    def rule(self, work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        name = op_name(value)
        if name == "relax.nn.layer_norm":
            return self._layer_norm(value)
        if name == "relax.nn.rms_norm":
            return _whole_rms_norm(value)
        if name == "relax.divide":
            return self._divided(work, value)
        if name == "relax.astype":
            return _between_casts(work, var, value)
        if name == "relax.multiply":
            for left, right in (value.args, reversed(list(value.args))):
                found = self._scaled(work, left, right)
                found = self._weighted(work, var, left, right) if found is None else found
                if found is not None:
                    return found
        if name == "relax.add":
            for left, right in (value.args, reversed(list(value.args))):
                found = self._biased(work, left, right)
                if found is not None:
                    return found
        return None

    def _layer_norm(self, value: relax.Call) -> relax.Expr | None:
        x, attrs = value.args[0], value.attrs
        size = dims(x)[-1]
        if [int(a) % len(dims(x)) for a in attrs.axes] != [len(dims(x)) - 1] or not isinstance(size, int):
            return None
        weight = value.args[1] if attrs.scale else self.constant(1.0, size)
        bias = value.args[2] if attrs.center else self.constant(0.0, size)
        return layer_norm(x, weight, bias, float(attrs.epsilon))

    def _normal(self, work: Rewriter, x: relax.Expr, eps: float) -> relax.Expr | None:
        size = dims(x)[-1]
        if not isinstance(size, int) or len(dims(x)) < 2:
            return None
        centred = _centred(work, x)
        if centred is not None:
            return layer_norm(centred, self.constant(1.0, size), self.constant(0.0, size), eps)
        return rms_norm(x, self.constant(1.0, size), eps)

    def _divided(self, work: Rewriter, value: relax.Call) -> relax.Expr | None:
        """``x / sqrt(mean(x²) + eps)``"""
        x, root = value.args
        inner = work.value(root, "relax.sqrt")
        eps = None if inner is None else _mean_square_plus_eps(work, inner.args[0], x)
        return None if eps is None else self._normal(work, x, eps)

    def _scaled(self, work: Rewriter, x: relax.Expr, r: relax.Expr) -> relax.Expr | None:
        """``x · r`` or ``x · (r · w)`` with ``r = rsqrt(mean(x²) + eps)``"""
        eps = _inverse_rms(work, r, x)
        if eps is not None:
            return self._normal(work, x, eps)
        product = work.value(r, "relax.multiply")
        if product is None:
            return None
        for inverse, w in (product.args, reversed(list(product.args))):
            eps = _inverse_rms(work, inverse, x)
            if eps is not None and _is_weight(w, x):
                normal = self._normal(work, x, eps)
                return None if normal is None else self._with_weight(work, work.normal(normal), w)
        return None

    def _weighted(self, work: Rewriter, var: relax.Var, normal: relax.Expr, w: relax.Expr) -> relax.Expr | None:
        """``norm(x, ones) · w`` -> ``norm(x, w)``, if nothing else reads the norm."""
        value = work.value(normal)
        if op_name(value) not in ("llmc.rms_norm", "llmc.layer_norm") or not work.single_use(normal):
            return None
        if not self.is_constant(value.args[1], 1.0) or not _is_weight(w, normal) or dtype_of(var) != dtype_of(normal):
            return None
        if op_name(value) == "llmc.layer_norm" and not self.is_constant(value.args[2], 0.0):
            return None
        return self._with_weight(work, value, w)

    def _with_weight(self, work: Rewriter, normal: relax.Call, w: relax.Expr) -> relax.Expr:
        weight, offset = _without_offset(work, w)
        eps = float(normal.attrs["eps"])
        if op_name(normal) == "llmc.rms_norm":
            return rms_norm(normal.args[0], weight, eps, offset)
        return layer_norm(normal.args[0], w, normal.args[2], eps)

    def _biased(self, work: Rewriter, normal: relax.Expr, b: relax.Expr) -> relax.Expr | None:
        """``layer_norm(x, w, zeros) + b`` -> ``layer_norm(x, w, b)``, if nothing else reads the norm."""
        value = work.value(normal, "llmc.layer_norm")
        if value is None or not work.single_use(normal) or not self.is_constant(value.args[2], 0.0) or not _is_weight(b, normal):
            return None
        return layer_norm(value.args[0], value.args[1], b, float(value.attrs["eps"]))


def _between_casts(work: Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    """``astype(norm(astype(x, float32), ...), dtype of x)`` -> ``norm(x, ...)``, if nothing else reads the wide norm.

    Before::  y = astype(llmc.rms_norm(astype(x, float32), w), bfloat16)        After::  y = llmc.rms_norm(x, w)
    """
    norm = work.value(value.args[0])
    if op_name(norm) not in ("llmc.rms_norm", "llmc.layer_norm") or not work.single_use(value.args[0]):
        return None
    x, *weights = (_before_cast(work, a) for a in norm.args)
    if dtype_of(norm.args[0]) != "float32" or dtype_of(x) != dtype_of(var):
        return None
    return relax.Call(norm.op, [x, *weights], norm.attrs)


def _before_cast(work: Rewriter, expr: relax.Expr) -> relax.Expr:
    """What ``expr`` was before it was widened to float32; itself if it was not."""
    cast = work.value(expr, "relax.astype")
    narrow = cast is not None and dtype_of(cast.args[0]) in ("bfloat16", "float16") and dtype_of(expr) == "float32"
    return cast.args[0] if narrow else expr


def _whole_rms_norm(value: relax.Call) -> relax.Expr | None:
    rank = len(dims(value.args[0]))
    if [int(a) % rank for a in value.attrs.axes] != [rank - 1]:
        return None
    return rms_norm(value.args[0], value.args[1], float(value.attrs.epsilon))


def _is_weight(w: relax.Expr, x: relax.Expr) -> bool:
    """Whether ``w`` is a vector over the last axis of ``x``."""
    return isinstance(w, relax.Var) and len(dims(w)) == 1 and same_dim(dims(w)[0], dims(x)[-1])


def _without_offset(work: Rewriter, w: relax.Expr) -> tuple[relax.Expr, float]:
    """``w + 1`` -> ``(w, 1.0)``"""
    total = work.value(w, "relax.add")
    if total is not None:
        for left, right in (total.args, reversed(list(total.args))):
            value = scalar(right)
            if value is not None and isinstance(left, relax.Var):
                return left, value
    return w, 0.0


def _is_square(work: Rewriter, expr: relax.Expr, x: relax.Expr) -> bool:
    value = work.value(expr)
    name = op_name(value)
    if name == "relax.power":
        return value.args[0].same_as(x) and scalar(value.args[1]) == 2.0
    if name == "relax.multiply":
        return value.args[0].same_as(x) and value.args[1].same_as(x)
    return name == "relax.square" and value.args[0].same_as(x)


def _is_mean(work: Rewriter, expr: relax.Expr) -> relax.Expr | None:
    """What is averaged over the last axis (kept as a unit axis), or None."""
    value = work.value(expr, "relax.mean")
    if value is None or not value.attrs.keepdims or value.attrs.axis is None:
        return None
    rank = len(dims(value.args[0]))
    return value.args[0] if [int(a) % rank for a in value.attrs.axis] == [rank - 1] else None


def _mean_square_plus_eps(work: Rewriter, expr: relax.Expr, x: relax.Expr) -> float | None:
    """eps, if ``expr`` is ``mean(x²) + eps``"""
    total = work.value(expr, "relax.add")
    if total is None:
        return None
    for mean, eps in (total.args, reversed(list(total.args))):
        value, square = scalar(eps), _is_mean(work, mean)
        if value is not None and square is not None and _is_square(work, square, x):
            return value
    return None


def _inverse_rms(work: Rewriter, expr: relax.Expr, x: relax.Expr) -> float | None:
    """eps, if ``expr`` is 1 / sqrt(mean(x²) + eps) in one of its spellings."""
    value = work.value(expr)
    name = op_name(value)
    if name == "relax.rsqrt" or (name == "relax.power" and scalar(value.args[1]) == -0.5):
        return _mean_square_plus_eps(work, value.args[0], x)
    if name == "relax.divide" and scalar(value.args[0]) == 1.0:
        root = work.value(value.args[1], "relax.sqrt")
        return None if root is None else _mean_square_plus_eps(work, root.args[0], x)
    return None


def _centred(work: Rewriter, x: relax.Expr) -> relax.Expr | None:
    """y, if ``x`` is ``y - mean(y)``"""
    value = work.value(x, "relax.subtract")
    if value is None:
        return None
    averaged = _is_mean(work, value.args[1])
    return value.args[0] if averaged is not None and averaged.same_as(value.args[0]) else None


def fuse_norm(graph: Graph, params: ParamTable) -> None:
    """Recognise the norms of ``graph``; constant weights are added to ``params`` and to the graph's parameters."""
    rewrite(graph, _Norms(graph, params).rule)
    graph.remove_unused_params(params)
