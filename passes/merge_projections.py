"""Linear layers that read the same activations -> one layer with the weights joined.

before::                                  after::

    q = llmc.linear(x, wq)                    y = llmc.linear(x, w)       # w = [wq; wk; wv], joined while streaming
    k = llmc.linear(x, wk)                    q, k, v = y[:, :a], y[:, a:b], y[:, b:]
    v = llmc.linear(x, wv)

One pass over x and one kernel instead of three. The joined matrix is a :class:`~llmc.importer.params.Concat` in the parameter
table: weights are never copied at run time. Layers merge if all have a bias or none has, the weights have one storage dtype,
quantization scheme and order of stored columns, and nothing else reads them (a tied embedding does not merge).
"""

from __future__ import annotations

from collections import defaultdict

from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of
from llmc.dialect.linear import linear
from llmc.importer.params import Concat, ParamTable
from llmc.passes.quantize.native import stored_order
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dims, take_slice

Linears = list[tuple[relax.Var, relax.Call]]


def merged_name(names: list[str]) -> str:
    """``a.q_proj.weight``, ``a.k_proj.weight`` -> ``a.q_proj+k_proj.weight``"""
    parts = [name.split(".") for name in names]
    shortest = min(len(p) for p in parts)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head)
    middle = "+".join(".".join(p[head : len(p) - tail]) for p in parts)
    return ".".join([*parts[0][:head], middle, *parts[0][len(parts[0]) - tail :]])


class _Merge:
    def __init__(self, graph: Graph, params: ParamTable) -> None:
        self.graph = graph
        self.params = params
        self.uses = graph.uses()
        self.weights = set(graph.params[graph.inputs :])
        self.group_of: dict[relax.Var, Linears] = {}
        for group in self._groups():
            for var, _ in group:
                self.group_of[var] = group
        self.merged: dict[relax.Var, relax.Var] = {}
        self.offset: dict[relax.Var, int] = {}

    def _groups(self) -> list[Linears]:
        """Linear layers that can merge, by what they read, in the order of the graph."""
        groups: dict[tuple, Linears] = defaultdict(list)
        for var, value in self.graph.bindings:
            if op_name(value) != "llmc.linear" or var.same_as(self.graph.output):
                continue
            attrs = attrs_of(value)
            owned = list(value.args[1 : 3 if attrs["bias"] else 2])
            if attrs["residual"] or attrs["activation"] != "none" or not all(self._owned(w) for w in owned):
                continue
            param = self.params[value.args[1].name]
            columns = stored_order(param)
            groups[value.args[0], attrs["bias"], param.dtype, param.source.dtype, param.scheme, columns].append((var, value))
        return [g for g in groups.values() if len(g) > 1]

    def _owned(self, weight: relax.Expr) -> bool:
        """Whether ``weight`` is a parameter that nothing else reads."""
        return isinstance(weight, relax.Var) and weight in self.weights and self.uses[weight] == 1

    def _join(self, weights: list[relax.Var]) -> relax.Var:
        """The parameter that holds ``weights`` one below the other; they leave the table and the signature."""
        name = merged_name([w.name for w in weights])
        held = [self.params[w.name] for w in weights]
        param = self.params.add(name, Concat(tuple(p.source for p in held)), held[0].dtype)
        param.scheme = held[0].scheme
        for w in weights:
            self.params.remove(w.name)
        var = relax.Var(name, TensorType(list(param.shape), param.dtype))
        position = next(i for i, p in enumerate(self.graph.params) if p.same_as(weights[0]))
        self.graph.params[position] = var
        return var

    def rule(self, work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        group = self.group_of.get(var)
        if group is None:
            return None
        first = group[0][0]
        if first.same_as(var):
            weight = self._join([call.args[1] for _, call in group])
            bias = self._join([call.args[2] for _, call in group]) if attrs_of(value)["bias"] else None
            self.merged[first] = work.emit(linear(value.args[0], weight, bias))
            row = 0
            for member, call in group:
                self.offset[member] = row
                row += int(dims(call.args[1])[0])
        begin = self.offset[var]
        return take_slice(self.merged[first], 1, begin, begin + int(dims(var)[1]))


def merge_projections(graph: Graph, params: ParamTable) -> None:
    """Merge what can be merged; the joined weights replace their parts in ``params`` and in the graph's parameters."""
    rewrite(graph, _Merge(graph, params).rule)
    uses = graph.uses()
    graph.params = graph.params[: graph.inputs] + [p for p in graph.params[graph.inputs :] if p in uses]
