"""x divided by scales, one a channel, without an operator where the graph allows.

before::                                       after::

    x = llmc.rms_norm(h, g)                        x = llmc.rms_norm(h, g / s)
    x = llmc.layer_norm(h, g, b)                   x = llmc.layer_norm(h, g / s, b / s)
    x = multiply(a, u);  u = llmc.linear(h, w)     u = llmc.linear(h, w / s)          # the rows of w
    anything else                                  x' = multiply(x, 1 / s)            # read by the layers in question

The first three change parameters alone, and only if nothing else reads what they change. Where the columns of a table that rows are
looked up in were multiplied by s (an embedding that is the output matrix too), its rows are divided again::

    e = take(w, ids)                               e = multiply(take(w, ids), 1 / s)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import TensorType, op

from llmc.dialect.core import attrs_of
from llmc.importer.params import DTYPES, Constant, Mapped, Param, ParamTable
from llmc.passes.quantize.rounded import Rounded
from llmc.passes.quantize.smoothquant import Smoothed
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dtype_of


class Folds:
    """Divisions of values of ``graph``. Parameters change at once, operators are added by :meth:`insert`."""

    def __init__(self, graph: Graph, params: ParamTable) -> None:
        self.params = params
        self.uses = graph.uses()
        self.values = dict(graph.bindings)
        self.weights = set(graph.params[graph.inputs :])
        self.inserted: list[tuple[relax.Var, set[relax.Var], np.ndarray]] = []
        self.looked_up: dict[relax.Var, np.ndarray] = {}

    def costs_an_operator(self, x: relax.Var, readers: Sequence[relax.Var]) -> bool:
        """Whether dividing ``x`` for the layers that bind ``readers`` takes an operator."""
        return self._producer(x, readers) is None

    def divide(self, x: relax.Var, readers: Sequence[relax.Var], scales: np.ndarray) -> None:
        """Let ``readers`` read x / ``scales``, float32 [k]."""
        if (scales == 1).all():
            return
        producer = self._producer(x, readers)
        if producer is None:
            self.inserted.append((x, set(readers), scales))
            return
        offset = float(attrs_of(producer).get("offset", 0.0))
        for var in producer.args[1:]:
            param = self.params[var.name]
            if isinstance(param.source, Rounded | Smoothed):
                factors = 1 / scales if param.source.row_factors is None else param.source.row_factors / scales
                param.source = replace(param.source, row_factors=factors.astype(np.float32))
            else:
                _divide_rows(param, scales, offset)

    def divide_rows_of(self, taken: relax.Var, scales: np.ndarray) -> None:
        """Let everything read ``taken`` / ``scales``, float32 [k], for rows ``taken`` of a table."""
        if not (scales == 1).all():
            self.looked_up[taken] = scales

    def _producer(self, x: relax.Var, readers: Sequence[relax.Var]) -> relax.Call | None:
        """The norm or linear layer whose parameters can take the division, or None."""
        if self.uses.get(x) != len(readers):
            return None
        value: Any = self.values.get(x)
        if op_name(value) == "relax.multiply":
            linears = [self.values.get(a) for a in value.args if self.uses.get(a) == 1]
            value = next((v for v in linears if op_name(v) == "llmc.linear" and _is_plain(v)), None)
        elif op_name(value) not in ("llmc.rms_norm", "llmc.layer_norm"):
            value = None
        if value is None or not all(a in self.weights and self.uses[a] == 1 for a in value.args[1:]):
            return None
        return value

    def insert(self, graph: Graph) -> None:
        """Add the operators."""
        if not self.inserted and not self.looked_up:
            return
        of_reader: dict[relax.Var, tuple[relax.Var, relax.Var]] = {}
        for x, readers, scales in self.inserted:
            of_reader |= dict.fromkeys(readers, (x, self._inverse(graph, x, scales)))
        of_table = {taken: self._inverse(graph, taken, scales) for taken, scales in self.looked_up.items()}
        made: dict[relax.Var, relax.Var] = {}

        def rule(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var in of_table:
                return op.multiply(work.emit(value), of_table[var])
            if var not in of_reader:
                return None
            x, factor = of_reader[var]
            if x not in made:
                made[x] = work.emit(op.multiply(value.args[0], factor))
            return relax.Call(value.op, [made[x], *value.args[1:]], value.attrs)

        rewrite(graph, rule)

    def _inverse(self, graph: Graph, x: relax.Var, scales: np.ndarray) -> relax.Var:
        """1 / ``scales`` as a parameter in the dtype of ``x``."""
        name = f"llmc.inverse_scales.{sum(p.name.startswith('llmc.inverse_scales.') for p in self.params.values())}"
        inverse = Constant((1 / scales).astype(DTYPES[dtype_of(x)]), name)
        self.params.add(name, inverse)
        factor = relax.Var(name, TensorType([len(scales)], inverse.dtype))
        graph.params.append(factor)
        return factor


def _is_plain(layer: relax.Call) -> bool:
    attrs = attrs_of(layer)
    return not attrs["residual"] and attrs["activation"] == "none"


def _divide_rows(param: Param, scales: np.ndarray, offset: float) -> None:
    """``param`` + ``offset`` divided by ``scales`` along its first axis, and ``offset`` taken off again."""
    by = scales.reshape(-1, *[1] * (len(param.shape) - 1))

    def divided(value: np.ndarray) -> np.ndarray:
        return (value.astype(np.float32) + np.float32(offset)) / by - np.float32(offset)

    label = f"divided by {sha256(scales.tobytes()).hexdigest()[:16]}"
    param.source = Mapped((param.source,), divided, param.shape, param.source.dtype, label)
