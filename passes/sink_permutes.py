"""Permutations move below the operators that do not care about the order of axes, where they meet their inverses.

before::                                      after::

    b = permute_dims(a, [1, 0, 2])                c = strided_slice(a, 2, ...)
    c = strided_slice(b, 2, ...)                  d = llmc.rms_norm(c, w)
    d = llmc.rms_norm(c, w)                       e = d
    e = permute_dims(d, [1, 0, 2])

Models work on ``[heads, tokens, d]``, the dialect on ``[tokens, heads, d]``.
"""

from __future__ import annotations

from tvm import relax
from tvm.relax import op

from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import axis_slice, permutation, scalar, take_slice
from llmc.passes.simplify import compose_permutes

ELEMENTWISE = {
    "relax.abs", "relax.astype", "relax.clip", "relax.cos", "relax.erf", "relax.exp", "relax.log", "relax.negative",
    "relax.nn.gelu", "relax.nn.gelu_tanh", "relax.nn.relu", "relax.nn.silu", "relax.rsqrt", "relax.sigmoid", "relax.sin",
    "relax.sqrt", "relax.square", "relax.tanh",
}  # fmt: skip
"""Operators that act on each element of one tensor operand alone."""

BINARY = {"relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.power", "relax.maximum", "relax.minimum"}
"""Operators that act on each element of a tensor and a scalar constant."""

LAST_AXIS = {"llmc.rms_norm", "llmc.layer_norm"}
"""Operators that act on each vector along the last axis of their first operand."""


def _sink(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    name = op_name(value)
    if name == "relax.permute_dims":
        return compose_permutes(work, var, value)
    if name not in ELEMENTWISE and name not in BINARY and name not in LAST_AXIS and name != "relax.strided_slice":
        return None
    positions = (0, 1) if name in BINARY else (0,)
    position = next((i for i in positions if work.value(value.args[i], "relax.permute_dims") is not None), None)
    if position is None:
        return None
    permute = work.value(value.args[position], "relax.permute_dims")
    axes, x = permutation(permute), permute.args[0]
    if name == "relax.strided_slice":
        cut = axis_slice(value)
        return None if cut is None else op.permute_dims(work.emit(take_slice(x, axes[cut[0]], *cut[1:])), axes)
    if name in LAST_AXIS and axes[-1] != len(axes) - 1:
        return None
    if name in BINARY and scalar(value.args[1 - position]) is None:
        return None
    args = list(value.args)
    args[position] = x
    return op.permute_dims(work.emit(relax.Call(value.op, args, value.attrs)), axes)


def sink_permutes(graph: Graph) -> None:
    """Move every permutation of ``graph`` as far down as the rules of this module let it."""
    rewrite(graph, _sink)
