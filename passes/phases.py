"""One graph over n packed tokens -> ``decode`` (one token per sequence) and ``extend`` (ragged, logits for chosen rows).

before::                                  after::

    main(ids [n], ...) -> [n, vocab]          decode(ids [b], ...) -> [b, vocab]
                                              extend(ids [n], ..., logit_rows [r], ...) -> [r, vocab]

``decode`` is the graph with ``n = b``. ``extend`` takes the wanted rows as early as it can: every operator that treats rows
independently, and whose readers all do, down to the logits, works on r rows instead of n. Attention over pages is one of them:
``logit_rows`` are in order, and of each sequence its last ones, so those rows attend as the whole chunk does, with q_indptr counted
in them; the keys and values of all rows are in the pages. So it is all from the queries of the last attention on: that, its
output projection, the last feed-forward, the final norm and the vocabulary projection::

    a = llmc.attend(q, pages, block_table, seq_lens, q_indptr)     starts = llmc.row_starts(logit_rows, q_indptr, seq_lens)
    h = llmc.linear(a, w)                                          q_rows = take(q, logit_rows)
                                                                   a = llmc.attend(q_rows, pages, block_table, seq_lens, starts)
                                                                   h = llmc.linear(a, w)
"""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.relax import TensorType, op
from tvm.relax.utils import copy_with_new_vars

from llmc.dialect.core import is_call
from llmc.dialect.paged import ATTEND
from llmc.dialect.row_starts import row_starts
from llmc.passes.rewrite import Graph, Rewriter, op_name, operands, substitute
from llmc.passes.shapes import dims

ROW_WISE = {
    "relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.power", "relax.maximum", "relax.minimum", "relax.where",
    "relax.greater", "relax.greater_equal", "relax.less", "relax.less_equal", "relax.equal", "relax.not_equal", "relax.logical_and",
    "relax.logical_or", "relax.logical_not", "relax.abs", "relax.astype", "relax.clip", "relax.cos", "relax.erf", "relax.exp",
    "relax.log", "relax.negative", "relax.nn.gelu", "relax.nn.gelu_tanh", "relax.nn.relu", "relax.nn.silu", "relax.rsqrt",
    "relax.sigmoid", "relax.sin", "relax.sqrt", "relax.square", "relax.tanh", "relax.reshape",
    "llmc.linear", "llmc.quantized_linear", "llmc.rms_norm", "llmc.layer_norm", "llmc.moe", "llmc.quantized_moe", "llmc.rope",
    "llmc.topk",
}  # fmt: skip
"""Operators whose row i of the result depends on row i of the operands alone, if both have the rows as their first axis."""

ALONG_AXIS = {"relax.mean", "relax.sum", "relax.max", "relax.min", "relax.nn.softmax", "relax.concat", "relax.gather_elements"}
"""Row-wise unless their ``axis`` is the first."""


def phases(graph: Graph) -> tuple[Graph, Graph]:
    """``(decode, extend)`` of a graph after :func:`~llmc.passes.paged_attention.paged_attention`. ``graph`` is not changed."""
    extend = Graph.of("extend", copy_with_new_vars(graph.function()))
    _take_rows(extend)
    decode = Graph.of("decode", _one_row_each(graph))
    for phase in (decode, extend):
        phase.attrs = {"num_input": 0}
    return decode, extend


def _one_row_each(graph: Graph) -> relax.Function:
    """``graph`` with n = b."""
    function = copy_with_new_vars(graph.function())
    n = function.params[0].ty.shape[0]
    b = next(p for p in function.params if p.name == "seq_lens").ty.shape[0]
    return function.bind_symbolic_vars({n: b})


def _mentions(dim: Any, n: tirx.Var) -> bool:
    """Whether a dimension is, or is computed from, n."""
    if isinstance(dim, int | tirx.IntImm):
        return False
    if isinstance(dim, tirx.Var):
        return bool(dim.same_as(n))
    return any(_mentions(part, n) for part in (dim.a, dim.b))


class _Rows:
    """Which values have the n packed rows as their first axis, and which bindings may work on fewer rows."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.n: tirx.Var = graph.params[0].ty.shape[0]
        self.tail = self._tail()

    def depends(self, expr: relax.Expr) -> bool:
        """Whether the type of ``expr`` mentions n."""
        return isinstance(expr.ty, TensorType) and any(_mentions(d, self.n) for d in dims(expr))

    def leads(self, expr: relax.Expr) -> bool:
        """Whether n is the first axis of ``expr`` and no other."""
        shape = dims(expr)
        first = bool(shape) and isinstance(shape[0], tirx.Var) and shape[0].same_as(self.n)
        return first and not any(_mentions(d, self.n) for d in shape[1:])

    def row_wise(self, var: relax.Var, value: relax.Expr) -> bool:
        name = op_name(value)
        if not isinstance(var.ty, TensorType) or not self.leads(var):
            return False
        rows = [v for v in operands(value) if self.depends(v)]
        if not rows or not all(self.leads(v) for v in rows):
            return False
        if name == "relax.strided_slice":
            return all(int(a) % len(dims(var)) != 0 for a in value.args[1])
        if name == "relax.take":
            table, ids = value.args
            return not self.depends(table if int(value.attrs.axis) == 0 else ids)
        if name not in ROW_WISE and name not in ALONG_AXIS:
            return False
        if name in ALONG_AXIS:
            axes = value.attrs.axis
            rank = len(dims(rows[0]))
            if axes is None or any(int(a) % rank == 0 for a in ([axes] if isinstance(axes, int) else axes)):
                return False
        same_rank = name in ("relax.reshape", "llmc.linear", "llmc.rope", "llmc.moe", "llmc.topk") or name in ALONG_AXIS
        return same_rank or all(len(dims(v)) == len(dims(var)) for v in rows)

    def _tail(self) -> set[relax.Var]:
        """The bindings that only serve the logits, row by row."""
        outside: set[relax.Var] = set()  # read by something that needs every row
        tail: set[relax.Var] = set()
        reached = {self.graph.output}
        for var, value in reversed(self.graph.bindings):
            serves = var in reached and var not in outside
            if serves and (self.row_wise(var, value) or is_call(value, ATTEND)):
                tail.add(var)
            if var not in tail or is_call(value, ATTEND):  # what it reads is needed whole: one operator makes queries and pages
                outside.update(operands(value))
            reached.update(operands(value))
        return tail


def _with_rows(expr: relax.Expr, n: tirx.Var, r: tirx.Var) -> relax.Expr:
    """An operand that is a shape, with r for n."""
    if not isinstance(expr, relax.ShapeExpr):
        return expr
    return relax.ShapeExpr([r if isinstance(d, tirx.Var) and d.same_as(n) else d for d in expr])


def _take_rows(graph: Graph) -> None:
    """Add the parameter ``logit_rows [r]`` and narrow the tail of ``graph`` to those rows."""
    rows = _Rows(graph)
    r = tirx.Var("r", "int64")
    logit_rows = relax.Var("logit_rows", TensorType([r], "int32"))
    work = Rewriter(graph)
    narrowed: dict[relax.Var, relax.Expr] = {}
    q_indptr, seq_lens = (next(p for p in graph.params if p.name == name) for name in ("q_indptr", "seq_lens"))

    def narrow(v: relax.Var) -> None:
        """Make sure that ``narrowed`` has v's wanted rows."""
        if v not in narrowed and rows.depends(v):
            narrowed[v] = work.emit(op.take(v, logit_rows, axis=0, mode="clip"), f"{v.name}_rows")

    for var, value in graph.bindings:
        if var not in rows.tail:
            work.bind(var, value)
            continue
        for v in operands(value):
            narrow(v)
        if is_call(value, ATTEND) and q_indptr not in narrowed:
            narrowed[q_indptr] = work.emit(row_starts(logit_rows, q_indptr, seq_lens), "starts")
        call = substitute(value, narrowed)
        args = [_with_rows(a, rows.n, r) for a in call.args]
        narrowed[var] = work.emit(relax.Call(call.op, args, call.attrs, call.ty_args), var.name)
    narrow(graph.output)
    graph.bindings, graph.output = work.bindings, narrowed[graph.output]
    position = next(i for i, p in enumerate(graph.params) if p.name == "block_table") + 1
    graph.params.insert(position, logit_rows)
    graph.inputs += 1
