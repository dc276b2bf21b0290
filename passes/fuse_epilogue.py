"""What follows a linear layer -> its operands and attributes.

before::                                    after::

    y = llmc.linear(x, w)                       y = llmc.linear(x, w, b, h, activation="silu")
    z = nn.silu(add(y, b))
    out = add(h, z)

A cast of a narrow result to float32 becomes the result's own dtype. Only where nothing else reads the intermediate value.
``fuse_bias`` runs before projections are merged, so that those with a bias merge too; activation and residual come after, on
what was not merged.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from llmc.dialect.core import attrs_of, call
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dims, dtype_of, same_dim, same_shape, scalar

ACTIVATION_OF = {"relax.nn.silu": "silu", "relax.nn.gelu": "gelu", "relax.nn.gelu_tanh": "gelu_tanh", "relax.nn.relu": "relu"}
"""Relax operator -> the ``activation`` of ``llmc.linear`` that computes it."""


def _open_linear(work: Rewriter, expr: relax.Expr, uses: int = 1) -> tuple[relax.Call, dict[str, Any]] | None:
    """The ``llmc.linear`` that only the current binding reads and whose residual is still free, with its attributes."""
    value = work.value(expr, "llmc.linear")
    if value is None or work.uses.get(expr) != uses:
        return None
    attrs = attrs_of(value)
    return None if attrs["residual"] else (value, attrs)


def _bias(work: Rewriter, value: relax.Call) -> relax.Expr | None:
    for y, b in (value.args, reversed(list(value.args))):
        found = _open_linear(work, y)
        if found is None or found[1]["bias"] or found[1]["activation"] != "none":
            continue
        if isinstance(b, relax.Var) and len(dims(b)) == 1 and same_dim(dims(b)[0], dims(y)[-1]):
            return call("llmc.linear", *found[0].args, b, **{**found[1], "bias": 1})
    return None


def _activation(work: Rewriter, y: relax.Expr, activation: str) -> relax.Expr | None:
    found = _open_linear(work, y)
    if found is None or found[1]["activation"] != "none":
        return None
    return call("llmc.linear", *found[0].args, **{**found[1], "activation": activation})


def _squared_relu(work: Rewriter, y: relax.Expr, uses: int) -> relax.Expr | None:
    found = _open_linear(work, y, uses)
    if found is None or found[1]["activation"] != "relu":
        return None
    return call("llmc.linear", *found[0].args, **{**found[1], "activation": "relu2"})


def _residual(work: Rewriter, value: relax.Call) -> relax.Expr | None:
    for y, r in (value.args, reversed(list(value.args))):
        found = _open_linear(work, y)
        if found is None or not isinstance(r, relax.Var):
            continue
        if same_shape(dims(r), dims(y)) and dtype_of(r) == dtype_of(y):
            return call("llmc.linear", *found[0].args, r, **{**found[1], "residual": 1})
    return None


def _unrounded(work: Rewriter, value: relax.Call, dtype: str) -> relax.Expr | None:
    """``astype(linear(x, w), float32)`` -> the float32 sums themselves: rounding them in between would tie logits."""
    found = _open_linear(work, value.args[0])
    if found is None or dtype != "float32" or dtype_of(value.args[0]) == "float32":
        return None
    return call("llmc.linear", *found[0].args, **{**found[1], "out_dtype": dtype})


def _second_residual(work: Rewriter, value: relax.Call) -> relax.Expr | None:
    """``(linear(x, w) + linear(y, v)) + h`` -> ``linear(x, w, residual=linear(y, v, residual=h))``: parallel branches."""
    for z, h in (value.args, reversed(list(value.args))):
        outer = work.value(z, "llmc.linear")
        if outer is None or not attrs_of(outer)["residual"] or not work.single_use(z) or not isinstance(h, relax.Var):
            continue
        found = _open_linear(work, outer.args[-1])
        if found is not None and same_shape(dims(h), dims(z)) and dtype_of(h) == dtype_of(z):
            inner = work.emit(call("llmc.linear", *found[0].args, h, **{**found[1], "residual": 1}))
            return call("llmc.linear", *list(outer.args)[:-1], inner, **attrs_of(outer))
    return None


def _epilogue(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    name = op_name(value)
    if name in ACTIVATION_OF:
        return _activation(work, value.args[0], ACTIVATION_OF[name])
    if name == "relax.square" or (name == "relax.power" and scalar(value.args[1]) == 2.0):
        return _squared_relu(work, value.args[0], uses=1)
    if name == "relax.multiply" and value.args[0].same_as(value.args[1]):
        return _squared_relu(work, value.args[0], uses=2)
    if name == "relax.astype":
        return _unrounded(work, value, dtype_of(var))
    if name == "relax.add":
        found = _residual(work, value)
        return _second_residual(work, value) if found is None else found
    return None


def fuse_bias(graph: Graph) -> None:
    """Biases added after a linear layer become its operand."""
    rewrite(graph, lambda work, _, value: _bias(work, value) if op_name(value) == "relax.add" else None)


def fuse_epilogue(graph: Graph) -> None:
    """Activations and residual additions after a linear layer become part of it."""
    rewrite(graph, _epilogue)
