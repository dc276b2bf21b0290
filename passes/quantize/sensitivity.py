"""How much a model's predictions suffer when one matrix is rounded: measured for all matrices in one run.

The run has one window for every unit (the matrices of layers that read one x, which are stored alike so that they can merge), and
one more; all hold the same text. In a unit's own window its matrices are rounded, in every other window they are exact; what
comes out is a distribution of the next token for each unit, whose KL divergence from the untouched window's is what rounding that
unit costs. Tokens of different windows never meet, so one pass over the weights measures everything.

Small errors add up: the loss grows by the sum over layers of a factor times the squared error of the layer (the linearity theorem,
arXiv:2411.17525; the same follows from a second-order expansion at a minimum). So the measured divergence is carried over to other
schemes by the ratio of the squared errors ‖(Q(W) - W) X‖² on the layer's inputs X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from llmc.importer.params import Param, ParamTable
from llmc.passes.quantize.forward import Forward, Progress, linear
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import Scheme, scheme
from llmc.passes.rewrite import Graph, op_name
from llmc.passes.shapes import dims

PROBE = "int4z_g64"
"""What units are rounded to while they are measured: coarse enough to be seen, fine enough for small errors."""
ROWS = 256
"""Rows of a matrix, evenly spread, that its errors are taken from."""
NO_SEARCH = (1.0,)


@dataclass
class Unit:
    """Matrices that get one scheme. ``divergence``: what rounding them to :data:`PROBE` costs, in nats per token; ``errors``: their
    squared errors by scheme, in units of that of :data:`PROBE`."""

    params: list[Param] = field(default_factory=list)
    divergence: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def loss(self, how: Scheme) -> float:
        """The divergence expected of a scheme."""
        return self.divergence * self.errors[how.name]


def units_of(graph: Graph, params: ParamTable, names: set[str]) -> dict[relax.Var, Unit]:
    """The matrices ``names`` in units, by the variables of the weights that read them."""
    by_input: dict[Any, Unit] = {}
    found: dict[relax.Var, Unit] = {}
    for _, value in graph.bindings:
        if op_name(value) not in ("llmc.linear", "relax.take"):
            continue
        var = value.args[1 if op_name(value) == "llmc.linear" else 0]
        if not isinstance(var, relax.Var) or var.name not in names or var in found:
            continue
        unit = found[var] = by_input.setdefault(value.args[0], Unit())
        unit.params.append(params[var.name])
    return found


class _Probe:
    """The visitor: rounds each unit in its own window and takes the errors of the schemes."""

    def __init__(self, of_weight: dict[relax.Var, Unit], schemes: Sequence[Scheme]) -> None:
        self.of_weight = of_weight
        self.units = list({id(u): u for u in of_weight.values()}.values())
        self.window = {id(unit): i + 1 for i, unit in enumerate(self.units)}
        self.schemes = schemes

    def visit(self, run: Forward, var: relax.Var, value: Any) -> np.ndarray | None:
        position = {"llmc.linear": 1, "relax.take": 0}.get(op_name(value), -1)
        unit = self.of_weight.get(value.args[position]) if position >= 0 else None
        if unit is None:
            return None
        weight, rows = run.value(value.args[position]), run.rows(self.window[id(unit)])
        if position == 0:
            ids = run.value(value.args[1])
            looked_up = weight[ids]
            if rows is not None:
                looked_up[rows] = self._rounded(weight)[ids[rows]]
                self._errors(unit, weight, None)
            return looked_up
        x = run.value(value.args[0])
        bias = run.value(value.args[2]) if len(value.args) > 2 else None
        y = linear(x, weight, bias)
        if rows is not None:
            y[rows] = linear(x[rows], self._rounded(weight), bias)
            self._errors(unit, weight, x[rows])
        return y

    @staticmethod
    def _rounded(weight: np.ndarray) -> np.ndarray:
        return quantize(weight, scheme(PROBE), clippings=NO_SEARCH).dequantize()

    def _errors(self, unit: Unit, weight: np.ndarray, x: np.ndarray | None) -> None:
        """Add the squared errors of one matrix, on inputs ``x`` [n, k] or, for rows that are looked up, as they are."""
        sample = np.ascontiguousarray(weight[:: -(-len(weight) // ROWS)])
        for how in self.schemes:
            wrong = quantize(sample, how, clippings=NO_SEARCH).dequantize() - sample
            error = float(np.square(wrong if x is None else wrong @ x.T).sum()) * len(weight) / len(sample)
            unit.errors[how.name] = unit.errors.get(how.name, 0.0) + error


def measure(
    graph: Graph, params: ParamTable, names: set[str], schemes: Sequence[Scheme], text: np.ndarray, progress: Progress
) -> list[Unit]:
    """The units that the matrices ``names`` fall into, measured on ``text``, token ids [length], with the errors of ``schemes``."""
    of_weight = units_of(graph, params, names)
    probe = _Probe(of_weight, [*schemes, scheme(PROBE)])
    run = Forward(graph, params, np.tile(text, (len(probe.units) + 1, 1)))
    vocab = dims(graph.output)[-1]
    head = max(i for i, (_, v) in enumerate(graph.bindings) if op_name(v) == "llmc.linear" and dims(v.args[1])[0] == vocab)
    run.visit(probe.visit, progress, head)
    exact = None
    for window, logits in enumerate(run.window_by_window(probe.visit, head)):
        q = logits - logits.max(axis=1, keepdims=True)
        q -= np.log(np.exp(q).sum(axis=1, keepdims=True))
        if exact is None:
            exact = q
            continue
        divergence = float((np.exp(exact) * (exact - q)).sum(axis=1).mean())
        probe.units[window - 1].divergence = max(divergence, 0.0)
    for unit in probe.units:
        one = max(unit.errors[PROBE], 1e-30)
        unit.errors = {name: error / one for name, error in unit.errors.items()}
    return probe.units
