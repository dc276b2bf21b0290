"""Arithmetic that stays with Relax is done in float32 where values are stored in a narrower type.

before::                                      after::

    s = nn.silu(g)          # bfloat16            w = nn.silu(astype(g, float32))
    y = multiply(s, u)                            y = astype(multiply(w, astype(u, float32)), bfloat16)

The casts fuse into the generated kernels: a chain of operators is rounded once, at its end, and reductions add in float32. The
dialect's own operators do so in their kernels. A value that several operators read stays narrow, since it goes through memory.
"""

from __future__ import annotations

from tvm import relax
from tvm.relax import op

from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dtype_of, scalar
from llmc.passes.sink_permutes import BINARY, ELEMENTWISE

NARROW = ("bfloat16", "float16")
ARITHMETIC = (ELEMENTWISE | BINARY | {"relax.mean", "relax.sum", "relax.nn.softmax"}) - {"relax.astype", "relax.nn.relu"}
"""Operators that round. Those that only choose or move values (relu, where, concat, max over an axis) lose nothing when narrow."""


def _wide(work: Rewriter, expr: relax.Expr) -> relax.Expr:
    """A narrow operand in float32: the value it was rounded from, if nothing else reads it, else a cast of it."""
    if not isinstance(expr.ty, relax.TensorType) or dtype_of(expr) not in NARROW:
        return expr
    value = scalar(expr)
    if value is not None:
        return relax.const(value, "float32")
    cast = work.value(expr, "relax.astype")
    if cast is not None and dtype_of(cast.args[0]) == "float32" and work.single_use(expr):
        return cast.args[0]
    return work.emit(op.astype(expr, "float32"))


def _rule(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) not in ARITHMETIC or dtype_of(var) not in NARROW:
        return None
    same = {a: _wide(work, a) for a in dict.fromkeys(value.args) if isinstance(a, relax.Var)}
    args = [same[a] if a in same else _wide(work, a) for a in value.args]
    return op.astype(work.emit(relax.Call(value.op, args, value.attrs)), dtype_of(var))


def widen(graph: Graph) -> None:
    """Widen the arithmetic of ``graph``; one without narrow values stays as it is."""
    rewrite(graph, _rule)
