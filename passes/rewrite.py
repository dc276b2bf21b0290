"""A Relax function as a Python list of bindings, and one forward walk that rewrites it.

``PyExprMutator`` normalises every expression it meets, which costs far more than the passes themselves. Here a pass reads
one dataflow block as a list, replaces what it wants, and the function is built once at the end: linear time, and only new
expressions go through type inference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op

from llmc.errors import InternalError
from llmc.importer.params import ParamTable

Binding = tuple[relax.Var, relax.Expr]
Rule = Callable[["Rewriter", relax.Var, relax.Expr], "relax.Expr | None"]


def op_name(expr: relax.Expr | None) -> str:
    """``"relax.add"``, ``"llmc.linear"``; ``""`` for anything but a call of an operator."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
        return expr.op.name
    return ""


@lru_cache(maxsize=1 << 15)
def operands(expr: relax.Expr) -> tuple[relax.Var, ...]:
    """The variables that a bound value reads, in order, those inside tuples too. Remembered: every pass asks again."""
    if isinstance(expr, relax.Var):
        return (expr,)
    if isinstance(expr, relax.Call):
        parts = expr.args
    elif isinstance(expr, relax.Tuple):
        parts = expr.fields
    elif isinstance(expr, relax.TupleGetItem):
        parts = [expr.tuple_value]
    else:
        return ()
    return tuple(v for part in parts for v in ((part,) if isinstance(part, relax.Var) else operands(part)))


def substitute(expr: relax.Expr, subst: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """``expr`` with variables replaced by values of the same type. The result keeps the type of ``expr``."""
    if isinstance(expr, relax.Var):
        return subst.get(expr, expr)
    if not any(v in subst for v in operands(expr)):
        return expr
    if isinstance(expr, relax.Call):
        args = [substitute(a, subst) for a in expr.args]
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args, ret_ty=expr.ty)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(f, subst) for f in expr.fields])
    return relax.TupleGetItem(substitute(expr.tuple_value, subst), expr.index)


@dataclass
class Graph:
    """One dataflow block. ``bindings`` are in execution order; ``output`` is bound by one of them.

    The first ``inputs`` parameters are inputs and state, the others weights, named as in the parameter table.
    """

    name: str
    params: list[relax.Var]
    bindings: list[Binding]
    output: relax.Var
    inputs: int
    attrs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, function: relax.Function) -> Graph:
        """The graph of a function that is one dataflow block. Raises InternalError if it is not."""
        body = function.body
        if not isinstance(body, relax.SeqExpr) or not isinstance(body.body, relax.Var):
            raise InternalError(f"function {name}: its body is not a sequence of bindings that ends in a variable")
        alias: dict[relax.Var, relax.Expr] = {}
        bindings: list[Binding] = []
        for block in body.blocks:
            if not isinstance(block, relax.DataflowBlock):
                raise InternalError(f"function {name}: a block is not a dataflow block")
            for b in block.bindings:
                if not isinstance(b, relax.VarBinding):
                    raise InternalError(f"function {name}: {b.var.name} is bound by {type(b).__name__}")
                value = substitute(b.value, alias)
                if isinstance(value, relax.Var):
                    alias[b.var] = value
                else:
                    bindings.append((b.var, value))
        inputs = int(function.attrs["num_input"])
        return cls(name, list(function.params), bindings, substitute(body.body, alias), inputs)

    def function(self) -> relax.Function:
        """The graph as a Relax function of one dataflow block, with the graph's attributes."""
        result = relax.Var("logits", self.output.ty)
        bindings = [relax.VarBinding(v, e) for v, e in self.bindings]
        block = relax.DataflowBlock([*bindings, relax.VarBinding(result, self.output)])
        body = relax.SeqExpr([block], result)
        relax.expr._update_type(body, self.output.ty)
        function = relax.Function(self.params, body, self.output.ty, is_pure=True)
        return function.with_attrs({"global_symbol": self.name, "num_input": self.inputs, **self.attrs})

    def module(self) -> tvm.IRModule:
        return tvm.IRModule({self.name: self.function()})

    def uses(self) -> dict[relax.Var, int]:
        """How many times each variable is read; being the output counts once."""
        count: dict[relax.Var, int] = {self.output: 1}
        for _, value in self.bindings:
            for v in operands(value):
                count[v] = count.get(v, 0) + 1
        return count

    def readers(self) -> defaultdict[relax.Var, list[Binding]]:
        """The bindings that read each variable, once each and in their order; none for a variable that only the output is."""
        found: defaultdict[relax.Var, list[Binding]] = defaultdict(list)
        for binding in self.bindings:
            for v in set(operands(binding[1])):
                found[v].append(binding)
        return found

    def remove_dead(self) -> None:
        """Drop bindings that the output does not depend on. Parameters stay."""
        live = {self.output}
        kept: list[Binding] = []
        for var, value in reversed(self.bindings):
            if var in live:
                live.update(operands(value))
                kept.append((var, value))
        self.bindings = kept[::-1]

    def remove_unused_params(self, params: ParamTable) -> None:
        """Drop weights that nothing reads, from the signature and from ``params``."""
        uses = self.uses()
        for var in self.params[self.inputs :]:
            if var not in uses:
                params.remove(var.name)
        self.params = self.params[: self.inputs] + [p for p in self.params[self.inputs :] if p in uses]


class Rewriter:
    """The new bindings while a graph is rewritten: what exists so far, and how to add to it."""

    def __init__(self, graph: Graph) -> None:
        self.bindings: list[Binding] = []
        self.values: dict[relax.Var, relax.Expr] = {}
        self.uses = graph.uses()
        self._builder = relax.BlockBuilder()

    def normal(self, expr: relax.Expr) -> relax.Expr:
        """``expr`` with its type inferred."""
        return self._builder.normalize(expr)

    def emit(self, expr: relax.Expr, name: str = "") -> relax.Var:
        """Bind ``expr`` (operands are variables or constants) to a new variable. A variable is returned as it is."""
        if isinstance(expr, relax.Var):
            return expr
        expr = self.normal(expr)
        return self.bind(relax.DataflowVar(name or op_name(expr).rpartition(".")[2] or "lv", expr.ty), expr)

    def bind(self, var: relax.Var, value: relax.Expr) -> relax.Var:
        self.bindings.append((var, value))
        self.values[var] = value
        return var

    def value(self, expr: relax.Expr, op: str = "") -> Any:
        """What ``expr`` is bound to, if that is known and (with ``op``) is a call of that operator; else None."""
        found = self.values.get(expr) if isinstance(expr, relax.Var) else None
        return found if not op or op_name(found) == op else None

    def single_use(self, expr: relax.Expr) -> bool:
        """Whether ``expr`` is read exactly once. A replacement is read as often as what it replaced."""
        return isinstance(expr, relax.Var) and self.uses.get(expr) == 1


def rewrite(graph: Graph, rule: Rule) -> None:
    """Walk the bindings once, in order. ``rule(rewriter, var, value)`` sees each value with its operands already rewritten.

    It returns None to keep the binding, a variable to replace ``var`` everywhere, or an expression to bind instead. The
    replacement must have the type of ``var``. Bindings that are then dead are dropped.
    """
    work = Rewriter(graph)
    subst: dict[relax.Var, relax.Expr] = {}
    for var, old in graph.bindings:
        value = substitute(old, subst)
        new = rule(work, var, value)
        if new is None:
            work.bind(var, value)
            continue
        subst[var] = new_var = work.emit(new, var.name)
        work.uses[new_var] = work.uses.get(new_var, 0) + work.uses.get(var, 0)
    graph.bindings = work.bindings
    graph.output = substitute(graph.output, subst)
    graph.remove_dead()
