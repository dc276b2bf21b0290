"""A hash of a graph's meaning: operators, attributes, types and how they connect, but no weight and no variable name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from tvm import relax

from llmc.dialect.core import attrs_of, is_call
from llmc.passes.rewrite import Graph, op_name


def _text(expr: relax.Expr, number: Mapping[relax.Var, int]) -> str:
    if isinstance(expr, relax.Var):
        return f"%{number[expr]}" if expr in number else expr.name
    if isinstance(expr, relax.Call):
        attrs = sorted(attrs_of(expr).items()) if is_call(expr) else expr.attrs
        return f"{op_name(expr)}({', '.join(_text(a, number) for a in expr.args)}) {attrs}"
    if isinstance(expr, relax.Tuple):
        return f"({', '.join(_text(f, number) for f in expr.fields)})"
    if isinstance(expr, relax.TupleGetItem):
        return f"{_text(expr.tuple_value, number)}[{expr.index}]"
    return str(expr)


def graph_sha256(graph: Graph) -> str:
    """sha256 hex of the graph; parameters count by name, shape and dtype."""
    digest = hashlib.sha256()
    number: dict[relax.Var, int] = {}
    for p in graph.params:
        digest.update(f"{p.name} {p.ty}\n".encode())
        number[p] = len(number)
    for var, value in graph.bindings:
        digest.update(f"{_text(value, number)} {var.ty}\n".encode())
        number[var] = len(number)
    digest.update(f"{_text(graph.output, number)}\n".encode())
    return digest.hexdigest()
