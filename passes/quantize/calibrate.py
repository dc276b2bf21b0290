"""Quantizing by what layers see: the graph runs over calibration text, and a method rounds each matrix as its turn comes.

before::                                             after (AWQ, SmoothQuant)::

    x = llmc.rms_norm(h, g)                              x = llmc.rms_norm(h, g / s)
    q, k, v = llmc.linear(x, wq), ...                    q, k, v = llmc.linear(x, Q(wq · s)), ...
    y = llmc.linear(multiply(a, u), w)                   y = llmc.linear(multiply(a, u / t), Q(w · t))   # in u's rows
    z = llmc.linear(o, w)                                z = llmc.linear(multiply(o, 1 / r), Q(w · r))

GPTQ changes no operator. The text runs twice at once there, through the quantized layers and through the exact ones, so that each
layer can make up for what those before it got wrong (:mod:`.error_propagation`); AWQ looks at the model as it was, as its authors
do. AWQ's scales go into the norm or the linear layer before where nothing else reads its result; elsewhere the division is an
operator of its own, if that gains enough.

SmoothQuant puts its scales where AWQ does, but adds no operator, save one behind the lookup in an embedding that is the output
matrix too: e = multiply(take(Q(w · s), ids), 1 / s). It is for 8 bits, where activations are rounded too; AWQ and GPTQ are for
fewer. What one linear layer reads is quantized so; other matrices are rounded to nearest.
The codes go to files at once: memory is that of :mod:`.forward`, one matrix, and a few k × k matrices of moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tvm import relax

from llmc.dialect.core import attrs_of
from llmc.importer.finite import check_finite
from llmc.importer.params import Param, ParamTable
from llmc.passes.quantize.awq import awq, search
from llmc.passes.quantize.error_propagation import make_up, ridge_factor
from llmc.passes.quantize.fold_scales import Folds
from llmc.passes.quantize.forward import Forward, Progress, linear, tensor
from llmc.passes.quantize.gptq import gptq, walk
from llmc.passes.quantize.native import native_scheme
from llmc.passes.quantize.packed import relative_error
from llmc.passes.quantize.rounded import Rounded, save
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, scheme
from llmc.passes.quantize.smoothquant import Smoothed, sizes, smooth
from llmc.passes.rewrite import Graph, op_name
from llmc.schedules import layouts
from llmc.targets.base import Target

WORTH_AN_OPERATOR = 0.9
"""AWQ divides x by an operator of its own if the squared error falls below this part of what it is without."""


@dataclass
class Calibration:
    """``windows``: token ids [windows, length]. ``folder`` takes the codes, and must be there until they have been read. ``own``:
    the text is the one that comes with llmc."""

    windows: np.ndarray
    folder: Path
    progress: Progress = lambda *_: None
    own: bool = True
    files: int = 0

    def keep(self, param: Param, method: str, exact: np.ndarray, tensor: QuantizedTensor) -> None:
        """Let ``param`` be ``tensor`` from now on, the rounded form of ``exact``."""
        path = self.folder / f"{self.files}.npz"
        self.files += 1
        save(path, tensor)
        param.source = Rounded(param.source, tensor.scheme.name, method, path, relative_error(exact, tensor))


@dataclass
class _Layers:
    """Linear layers that read the same x, each with its weight's parameter."""

    members: list[tuple[relax.Var, relax.Call]] = field(default_factory=list)
    scales: np.ndarray | None = None


def calibrate(graph: Graph, params: ParamTable, method: str, target: Target, calibration: Calibration) -> None:
    """Give every matrix of ``graph`` that is to be quantized, and is worth it, the codes that ``method`` finds."""
    layers = _layers(graph, params, method, target)
    if not layers:
        return
    work = METHODS[method](layers, params, calibration)
    run = Forward(graph, params, np.tile(calibration.windows, (work.RUNS, 1)))
    last = max(i for i, (_, value) in enumerate(graph.bindings) if work.concerns(value))
    work.last = graph.bindings[last][0]
    run.visit(work.visit, lambda done, total, what: calibration.progress(done, total, f"{method} {what}"), last + 1)
    work.finish(graph)


def _layers(graph: Graph, params: ParamTable, method: str, target: Target) -> dict[relax.Var, _Layers]:
    """The layers to quantize, by what they read, in the order of the graph."""
    readers, weights = graph.readers(), set(graph.params[graph.inputs :])
    found: dict[relax.Var, _Layers] = {}
    for var, value in graph.bindings:
        if op_name(value) != "llmc.linear" or value.args[1] not in weights:
            continue
        others = [reader for _, reader in readers[value.args[1]] if not reader.same_as(value)]
        if others and not (method == "smoothquant" and all(op_name(reader) == "relax.take" for reader in others)):
            continue
        param = params[value.args[1].name]
        if param.scheme and _is_worth_it(param, method, target):
            found.setdefault(value.args[0], _Layers()).members.append((var, value))
    return found


def _is_worth_it(param: Param, method: str, target: Target) -> bool:
    """Whether ``method`` can gain on ``param``: bits that are few, or 8 with activations rounded too; a layout that stores them;
    and no codes of its own."""
    how, held = scheme(param.scheme), native_scheme(param.source)
    if (how.bits >= 8) != (method == "smoothquant") or how.super_group or (held and how in (scheme(held), scheme(held).flat())):
        return False
    return layouts.choose(how, param.shape[0], param.shape[1], target)[0] is not None


class _Method(ABC):
    """What methods share. ``RUNS``: how many times the text goes through the graph side by side. ``last``: the last layer to be
    quantized. Nothing reads its result, which may be as wide as a vocabulary."""

    RUNS = 1
    last: relax.Var | None = None

    def __init__(self, layers: dict[relax.Var, _Layers], params: ParamTable, calibration: Calibration) -> None:
        self.layers = layers
        self.params = params
        self.calibration = calibration
        self._latest: tuple[Any, tuple[Any, ...]] | None = None

    @abstractmethod
    def visit(self, run: Forward, var: relax.Var, value: Any) -> np.ndarray | None:
        """Quantize the matrix of a layer when its turn comes; the layer's result for the layers after it."""

    @abstractmethod
    def finish(self, graph: Graph) -> None:
        """Change the graph, if the method does, once all matrices are done."""

    def result(self, var: relax.Var, parts: Callable[[], list[np.ndarray]]) -> np.ndarray:
        """The rows ``parts`` of the layer ``var``, one below the other."""
        return np.empty(0, np.float32) if self.last is not None and var.same_as(self.last) else np.concatenate(parts())

    def concerns(self, value: Any) -> bool:
        group = self.layers.get(value.args[0]) if op_name(value) == "llmc.linear" else None
        return group is not None and any(call.same_as(value) for _, call in group.members)

    def of_inputs(self, x: relax.Var, products: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """``products`` of the rows of ``x``, kept for the other layers that read it."""
        if self._latest is None or not self._latest[0].same_as(x):
            self._latest = (x, products())
        return self._latest[1]

    def weight(self, call: relax.Call) -> tuple[Param, Scheme, np.ndarray]:
        param = self.params[call.args[1].name]
        exact = param.source.read()
        check_finite(exact, param.source)
        return param, scheme(param.scheme), exact.astype(np.float32)


class _Gptq(_Method):
    """The first half of all rows goes through the quantized layers, the second through the exact ones."""

    RUNS = 2

    def visit(self, run: Forward, var: relax.Var, value: Any) -> np.ndarray | None:
        if not self.concerns(value):
            return None
        param, how, exact = self.weight(value)
        x = value.args[0]
        seen, meant = (tensor(half) for half in np.split(run.value(x), 2))

        def products() -> tuple[Any, ...]:
            moments = (seen.T @ seen).numpy()
            return walk(moments), ridge_factor(moments), ((meant - seen).T @ seen).numpy()

        columns, factor, change = self.of_inputs(x, products)
        rounded = gptq(make_up(exact, factor, change), columns, how)
        self.calibration.keep(param, "gptq", exact, rounded)
        bias = run.value(value.args[2]) if attrs_of(value)["bias"] else None
        return self.result(var, lambda: [linear(seen.numpy(), rounded.dequantize(), bias), linear(meant.numpy(), exact, bias)])

    def finish(self, graph: Graph) -> None:
        """Nothing is left to do: the graph stays as it was."""


class _Scaling(_Method):
    """Methods that scale input channels: the model's exact results go on to the layers after."""

    def __init__(self, layers: dict[relax.Var, _Layers], params: ParamTable, calibration: Calibration) -> None:
        super().__init__(layers, params, calibration)
        self.folds: Folds | None = None

    def visit(self, run: Forward, var: relax.Var, value: Any) -> np.ndarray | None:
        if not self.concerns(value):
            return None
        x = value.args[0]
        group = self.layers[x]
        self.folds = self.folds or Folds(run.graph, self.params)
        if group.scales is None:
            readers = [v for v, _ in group.members]
            weights = [(exact, how) for _, how, exact in (self.weight(call) for _, call in group.members)]
            group.scales = self.scales(run, x, weights, self.folds.costs_an_operator(x, readers))
            self.folds.divide(x, readers, group.scales)
        exact = run.value(value.args[1])
        self.keep(run, value, group.scales)
        bias = run.value(value.args[2]) if attrs_of(value)["bias"] else None
        return self.result(var, lambda: [linear(run.value(x), exact, bias)])

    def moments(self, run: Forward, x: relax.Var) -> np.ndarray:
        """Σ x xᵀ over all tokens, float32 [k, k]."""

        def products() -> tuple[np.ndarray, ...]:
            rows = tensor(run.value(x))
            return ((rows.T @ rows).numpy(),)

        found: np.ndarray = self.of_inputs(x, products)[0]
        return found

    @abstractmethod
    def scales(self, run: Forward, x: relax.Var, weights: list[tuple[np.ndarray, Scheme]], costly: bool) -> np.ndarray:
        """The scales of x's channels, float32 [k]; ``costly``: dividing x by them takes an operator."""

    @abstractmethod
    def keep(self, run: Forward, call: relax.Call, scales: np.ndarray) -> None:
        """Let the weight of a layer be itself · diag(scales) from now on."""

    def finish(self, graph: Graph) -> None:
        if self.folds is not None:
            self.folds.insert(graph)


class _Awq(_Scaling):
    def scales(self, run: Forward, x: relax.Var, weights: list[tuple[np.ndarray, Scheme]], costly: bool) -> np.ndarray:
        found, gain = search(weights, self.moments(run, x))
        return np.ones_like(found) if costly and gain > WORTH_AN_OPERATOR else found

    def keep(self, run: Forward, call: relax.Call, scales: np.ndarray) -> None:
        param, how, exact = self.weight(call)
        rounded = awq(exact, scales, self.moments(run, call.args[0]), how)
        self.calibration.keep(param, "awq", exact * scales, rounded)


class _SmoothQuant(_Scaling):
    """The weights are left to be rounded as they are read: smoothing needs no rounding to go on."""

    def scales(self, run: Forward, x: relax.Var, weights: list[tuple[np.ndarray, Scheme]], costly: bool) -> np.ndarray:
        size = sizes(run.value(x))
        return np.ones_like(size) if costly else smooth([exact for exact, _ in weights], size)

    def keep(self, run: Forward, call: relax.Call, scales: np.ndarray) -> None:
        assert self.folds is not None
        if (scales == 1).all():
            return
        param = self.params[call.args[1].name]
        param.source = Smoothed(param.source, scales)
        for taken in _looked_up(run.graph, call.args[1]):
            self.folds.divide_rows_of(taken, scales)


def _looked_up(graph: Graph, table: relax.Var) -> list[relax.Var]:
    """Rows of ``table`` that are looked up, in the type that is computed in."""
    readers = graph.readers()
    found = [var for var, value in readers[table] if op_name(value) == "relax.take"]
    widened = {var: [v for v, value in readers[var] if op_name(value) == "relax.astype"] for var in found}
    return [casts[0] if len(casts) == len(readers[var]) == 1 else var for var, casts in widened.items()]


METHODS: dict[str, type[_Method]] = {"gptq": _Gptq, "awq": _Awq, "smoothquant": _SmoothQuant}
