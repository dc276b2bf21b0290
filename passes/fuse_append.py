"""Split of a merged projection, norms of its heads, rotations and the append -> ``llmc.rope_append``.

before::                                                       after::

    q = llmc.rope(reshape(qkv[:, :hq·d]), cos, sin)                t = llmc.rope_append(qkv, cos, sin, slots, pages)
    k = llmc.rope(reshape(qkv[:, hq·d:(hq+hk)·d]), cos, sin)       a = llmc.attend(t[0], t[1], ...)
    v = reshape(qkv[:, (hq+hk)·d:])
    p = llmc.append(k, v, slots, pages)
    a = llmc.attend(q, p, ...)

Between a slice and its rotation there may be an ``llmc.rms_norm`` over the heads, on both sides or on none. Only the exact
pattern is taken: whole rows in this order, one pair of tables, one kind of rotation. Layers that read the pages of an earlier
one read them from the fused operator. Where attention is over some rows alone, these are taken from the fused operator's queries.
Runs on each phase, after which nothing needs to look inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax

from llmc.dialect.core import attrs_of
from llmc.dialect.rope_append import rope_append
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import axis_slice, dims


@dataclass(frozen=True)
class _Heads:
    """``norm(reshape(source[:, begin:end], [n, count, size]))``; without a norm, ``weight`` is None and ``norm`` empty."""

    source: relax.Var
    begin: int
    end: int
    count: int
    size: int
    weight: relax.Expr | None
    norm: dict[str, Any]


def _heads(work: Rewriter, x: relax.Expr) -> _Heads | None:
    weight: relax.Expr | None = None
    norm: dict[str, Any] = {}
    normed = work.value(x, "llmc.rms_norm")
    if normed is not None:
        x, weight = normed.args
        norm = attrs_of(normed)
    reshaped = work.value(x, "relax.reshape")
    cut = work.value(reshaped.args[0], "relax.strided_slice") if reshaped is not None else None
    if cut is None:
        return None
    found = axis_slice(cut)
    if found is None or len(dims(cut.args[0])) != 2 or len(dims(x)) != 3 or found[0] != 1 or found[3] != 1:
        return None
    count, size = dims(x)[1:]
    if not isinstance(count, int) or not isinstance(size, int) or count * size != found[2] - found[1]:
        return None
    return _Heads(cut.args[0], found[1], found[2], count, size, weight, norm)


class _Fusion:
    def __init__(self) -> None:
        self.pages: dict[relax.Var, relax.Var] = {}
        """The result of an append that was fused -> the pages that the fused operator returns."""

    def rule(self, work: Rewriter, _: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) != "llmc.attend":
            return None
        q, pages, *rest = value.args
        if pages in self.pages:
            return relax.Call(value.op, [q, self.pages[pages], *rest], value.attrs)
        taken = work.value(q, "relax.take")
        fused = self._fused(work, q if taken is None else taken.args[0], pages)
        if fused is None:
            return None
        both = work.emit(fused)
        query = work.emit(relax.TupleGetItem(both, 0), "query")
        if taken is not None:
            query = work.emit(relax.Call(taken.op, [query, taken.args[1]], taken.attrs), "query_rows")
        self.pages[pages] = work.emit(relax.TupleGetItem(both, 1), "pages")
        return relax.Call(value.op, [query, self.pages[pages], *rest], value.attrs)

    def _fused(self, work: Rewriter, q: relax.Expr, pages: relax.Expr) -> relax.Call | None:
        append, q_rope = work.value(pages, "llmc.append"), work.value(q, "llmc.rope")
        if append is None or q_rope is None:
            return None
        k_rope = work.value(append.args[0], "llmc.rope")
        if k_rope is None or not all(a.same_as(b) for a, b in zip(q_rope.args[1:], k_rope.args[1:], strict=True)):
            return None
        parts = [_heads(work, x) for x in (q_rope.args[0], k_rope.args[0], append.args[1])]
        if any(part is None for part in parts) or attrs_of(q_rope) != attrs_of(k_rope):
            return None
        query, key, val = (part for part in parts if part is not None)
        whole = (query.begin, key.begin, val.begin, val.end) == (0, query.end, key.end, dims(query.source)[1])
        if not whole or not all(part.source.same_as(query.source) for part in (key, val)):
            return None
        if query.norm != key.norm or val.weight is not None or query.size != key.size or key.count != val.count:
            return None
        weights = None if query.weight is None or key.weight is None else (query.weight, key.weight)
        (_, cos, sin), (_, _, slots, held) = q_rope.args, append.args
        return rope_append(
            query.source, cos, sin, slots, held, weights, heads=query.count, v_dim=val.size,
            **attrs_of(append), **attrs_of(q_rope), **query.norm,
        )  # fmt: skip


def fuse_append(graph: Graph) -> None:
    """Fuse what can be fused in one phase's ``graph``."""
    rewrite(graph, _Fusion().rule)
