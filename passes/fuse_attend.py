"""Rotation, norms of heads and append -> part of the attention that reads them, in the decode phase.

before::                                                       after::

    t = llmc.rope_append(qkv, cos, sin, slots, pages)              t = llmc.rope_attend(qkv, cos, sin, slots, pages, table, ...)
    a = llmc.attend(t[0], t[1], table, ...)                        a = t[0]

A launch less, and the queries and the new key do not go through memory. Only where the target has a kernel for it; the rest keeps
both. Later layers that read the same pages, but not the queries, read them from the fused operator.
"""

from __future__ import annotations

from tvm import relax

from llmc.dialect.core import is_call
from llmc.dialect.rope_append import OP as ROPE_APPEND
from llmc.dialect.rope_attend import rope_attend
from llmc.passes.fuse_gated import Takes
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite


def fuse_attend(graph: Graph, takes: Takes) -> None:
    """Fuse what ``takes`` says that there are kernels for in the decode phase's ``graph``."""
    fused: dict[relax.Var, relax.Var] = {}
    """Pages that a fused ``llmc.rope_append`` returned -> those that the operator in its place returns."""

    def rule(work: Rewriter, _: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) != "llmc.attend":
            return None
        q, pages, *rest = value.args
        if pages in fused:
            return relax.Call(value.op, [q, fused[pages], *rest], value.attrs)
        query, held = work.value(q), work.value(pages)
        if not isinstance(query, relax.TupleGetItem) or not isinstance(held, relax.TupleGetItem) or not work.single_use(q):
            return None
        append = work.value(query.tuple_value)
        if not is_call(append, ROPE_APPEND) or not query.tuple_value.same_as(held.tuple_value):
            return None
        call = work.normal(rope_attend(append, value))
        if not takes(call, relax.Var("both", call.ty)):
            return None
        both = work.emit(call)
        fused[pages] = work.emit(relax.TupleGetItem(both, 1), "pages")
        return relax.TupleGetItem(both, 0)

    rewrite(graph, rule)
