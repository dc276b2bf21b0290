"""An RMS norm without weights (:mod:`.fold_gain`) that only linear layers read becomes part of each of them.

before::                                    after::

    h = llmc.rms_norm(x, ones)                  y = llmc.norm_linear(x, w)
    y = llmc.linear(h, w)                       z = llmc.norm_linear(x, v, ...)
    z = llmc.quantized_linear(h, v, ...)

A launch less, where the layers' kernels read rows of x so few that normalising them again costs nothing: for the decode phase.
Whatever else reads ``h`` (experts beside their router, a residual taken after the norm) wants it in memory, and then the layers
may as well read it there. Only where the target has a kernel for every one of the layers.
"""

from __future__ import annotations

from tvm import relax

from llmc.dialect.core import attrs_of
from llmc.dialect.norm import RMS_NORM
from llmc.dialect.norm_linear import norm_linear
from llmc.passes.fuse_gated import LAYERS, Takes
from llmc.passes.fuse_norm import is_ones
from llmc.passes.rewrite import Graph, Rewriter, op_name, operands, rewrite


def fold_norm(graph: Graph, takes: Takes) -> None:
    """Merge norms into the layers behind them, where ``takes`` says that there are kernels."""
    work = Rewriter(graph)
    readers = graph.readers()

    def folds(norm: relax.Call, h: relax.Var, y: relax.Var, reader: relax.Expr) -> bool:
        if op_name(reader) not in LAYERS or not reader.args[0].same_as(h) or operands(reader).count(h) != 1:
            return False
        return takes(work.normal(norm_linear(norm, reader)), y)

    folded = {
        h
        for h, norm in graph.bindings
        if _is_factor(norm) and not h.same_as(graph.output) and all(folds(norm, h, *reader) for reader in readers[h])
    }

    def rule(work: Rewriter, _: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) not in LAYERS or value.args[0] not in folded:
            return None
        return norm_linear(work.value(value.args[0]), value)

    rewrite(graph, rule)


def _is_factor(norm: relax.Expr) -> bool:
    """Whether it is an RMS norm that multiplies a row by one factor."""
    return op_name(norm) == RMS_NORM and is_ones(norm.args[1]) and attrs_of(norm)["offset"] == 0.0
