"""A graph run over calibration text, operator by operator, with a visitor at every binding.

All windows of the text go through one binding before the next: tokens are packed rows to every operator but attention, which sees
one window at a time. A weight is read when its operator runs and let go after; a value is let go after its last reader. Memory is
one weight and the activations of all windows at a few places of the graph.

What takes the time runs in torch on all cores, in float32; everything else goes through the interpreter's table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from llmc.dialect.attention import visible
from llmc.dialect.core import attrs_of, is_call
from llmc.dialect.interpreter import Interpreter
from llmc.dialect.moe import gate
from llmc.dialect.rope import rotated
from llmc.importer.params import ParamTable
from llmc.passes.rewrite import Graph, operands

Progress = Callable[[int, int, str], None]
Visitor = Callable[["Forward", Any, Any], "np.ndarray | None"]
"""Sees (the run, variable, value) before a binding is evaluated; what it returns, if not None, is taken as the result."""


class Forward(Interpreter):
    """One run of ``graph`` over ``windows``, token ids [windows, length]."""

    FLOATS = np.float32

    def __init__(self, graph: Graph, params: ParamTable, windows: np.ndarray) -> None:
        super().__init__(graph.function())
        self.graph = graph
        self.params = params
        self.windows, self.length = windows.shape
        self._weights = {var: var.name for var in graph.params[graph.inputs :]}
        self._held: dict[Any, np.ndarray] = {}
        self._window: int | None = None
        positions = np.tile(np.arange(self.length), self.windows)
        for var, value in zip(graph.params[: graph.inputs], (windows.reshape(-1), positions), strict=True):
            self._bind_symbols(var, value)
            self.values[var] = value.astype(np.int64)

    def visit(self, visitor: Visitor, progress: Progress, count: int | None = None) -> None:
        """Run the first ``count`` bindings, or all; ``values`` then holds what later ones and the output read.

        ``progress(done, total, weight)`` names the weight that was read last.
        """
        bindings = self.graph.bindings[:count]
        last = {v: i for i, (_, value) in enumerate(self.graph.bindings) for v in operands(value)}
        last[self.graph.output] = len(self.graph.bindings)
        name = ""
        for i, (var, value) in enumerate(bindings):
            name = next((self._weights[v] for v in operands(value) if v in self._weights), name)
            progress(i, len(bindings), name)
            found = visitor(self, var, value)
            self.values[var] = self._eval(value) if found is None else found
            for v in (var, *operands(value)):
                if last.get(v, i) <= i:
                    self.values.pop(v, None)
        progress(len(bindings), len(bindings), "")

    def window_by_window(self, visitor: Visitor, start: int) -> Iterator[np.ndarray]:
        """Run the bindings from ``start`` on for one window after the other, after :meth:`visit` has run those before; the result
        of each, [length, ...]. For the end of a graph, whose results are as wide as a vocabulary. Weights are read once."""
        bindings, whole = self.graph.bindings[start:], self.values
        self._held = {v: self._eval(v) for _, value in bindings for v in operands(value) if v in self._weights}
        n = next(d for d in self.graph.params[0].ty.shape)
        self.symbols[n] = self.length
        for window in range(self.windows):
            self._window = window
            rows = slice(window * self.length, (window + 1) * self.length)
            self.values = {v: a[rows] if _leads(v, n) else a for v, a in whole.items()}
            for var, value in bindings:
                found = visitor(self, var, value)
                self.values[var] = self._eval(value) if found is None else found
            yield self.values[self.graph.output]

    def rows(self, window: int) -> slice | None:
        """Where the rows of a window are in the values at hand; None in a run over another window."""
        if self._window is None:
            return slice(window * self.length, (window + 1) * self.length)
        return slice(0, self.length) if window == self._window else None

    def value(self, expr: Any) -> Any:
        """The array of an operand: a value computed before, or a weight, which is read."""
        return self._eval(expr)

    def _eval(self, expr: Any) -> Any:
        if expr in self._held:
            return self._held[expr]
        if expr in self._weights:
            return self.cast(self.params[self._weights[expr]].source.read(), str(expr.ty.dtype))
        return super()._eval(expr)

    def _call(self, call: Any) -> Any:
        fast = FAST.get(call.op.name)
        if fast is None:
            return super()._call(call)
        attrs = {**attrs_of(call), "length": self.length} if is_call(call) else call.attrs
        return fast(attrs, *(self._eval(a) for a in call.args))


def _leads(var: Any, n: Any) -> bool:
    """Whether the first axis of ``var`` is that of the packed tokens."""
    shape = var.ty.shape
    return len(shape) > 0 and isinstance(shape[0], type(n)) and bool(shape[0].same_as(n))


def tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor, over the same memory where torch can write to it."""
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [n, k] · weight [o, k]ᵀ + bias [o], float32."""
    y: np.ndarray = functional.linear(tensor(x), tensor(weight), None if bias is None else tensor(bias)).numpy()
    return y


def _linear(attrs: dict[str, Any], x: np.ndarray, weight: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    extra = list(rest)
    y = linear(x, weight, extra.pop(0) if attrs["bias"] else None)
    if attrs["activation"] != "none":
        y = ACTIVATIONS[attrs["activation"]](tensor(y)).numpy()
    return y + extra.pop(0) if attrs["residual"] else y


def _attention(attrs: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray, *sinks: np.ndarray) -> np.ndarray:
    length = attrs["length"]
    group = q.shape[1] // k.shape[1]
    mask = tensor(visible(np.arange(length), np.arange(length), attrs["window"], attrs["chunk"]))
    queries, keys, values = (tensor(a).view(-1, length, *a.shape[1:]).transpose(1, 2) for a in (q, k, v))  # [windows, h, length, d]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if sinks or attrs["softcap"] > 0:
        y = torch.stack([_attended(attrs, mask, *each, *sinks) for each in zip(queries, keys, values, strict=True)])
    elif torch.equal(mask, mask.new_ones(mask.shape).tril()):
        y = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=attrs["scale"])
    else:
        y = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=attrs["scale"])
    out: np.ndarray = y.transpose(1, 2).reshape(*q.shape[:2], -1).numpy()
    return out


def _attended(
    attrs: dict[str, Any], mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: np.ndarray
) -> Any:
    """Attention of one window, q, k and v [h, length, d], with what torch's own has not."""
    scores = q @ k.transpose(1, 2) * attrs["scale"]
    if attrs["softcap"] > 0:
        scores = attrs["softcap"] * torch.tanh(scores / attrs["softcap"])
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks:
        scores = torch.cat([scores, tensor(sinks[0])[:, None, None].expand(-1, len(mask), 1)], dim=2)
    return torch.softmax(scores, dim=2)[:, :, : len(mask)] @ v


def _moe(attrs: dict[str, Any], x: np.ndarray, ids: np.ndarray, shares: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    gate_up, down, *biases = weights
    how = {name: attrs[name] for name in ("activation", "alpha", "limit", "offset")}
    y = np.zeros_like(x)
    for expert in range(len(gate_up)):
        rows, slots = np.nonzero(ids == expert)
        if not len(rows):
            continue
        h = linear(x[rows], gate_up[expert], biases[0][expert] if biases else None)
        if attrs["gated"]:
            g, u = (h[:, 0::2], h[:, 1::2]) if attrs["interleave"] else np.split(h, 2, axis=1)
            h = np.ascontiguousarray(gate(g, u, **how), dtype=np.float32)
        else:
            h = ACTIVATIONS[attrs["activation"]](tensor(h)).numpy()
        y[rows] += shares[rows, slots, None] * linear(h, down[expert], biases[1][expert] if biases else None)
    return y


def _rope(attrs: dict[str, Any], x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return rotated(x, cos, sin, rotary_dim=attrs["rotary_dim"], interleaved=attrs["interleaved"])


def _rms_norm(attrs: dict[str, Any], x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    y: np.ndarray = functional.rms_norm(tensor(x), weight.shape, tensor(weight + np.float32(attrs["offset"])), attrs["eps"]).numpy()
    return y


def _layer_norm(attrs: dict[str, Any], x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    y: np.ndarray = functional.layer_norm(tensor(x), weight.shape, tensor(weight), tensor(bias), attrs["eps"]).numpy()
    return y


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., np.ndarray]:
    return lambda _, x: function(tensor(np.asarray(x))).numpy()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
FAST: dict[str, Callable[..., np.ndarray]] = {
    "llmc.linear": _linear,
    "llmc.attention": _attention,
    "llmc.moe": _moe,
    "llmc.rope": _rope,
    "llmc.rms_norm": _rms_norm,
    "llmc.layer_norm": _layer_norm,
    "relax.erf": _elementwise(torch.erf),
    "relax.nn.silu": _elementwise(ACTIVATIONS["silu"]),
    "relax.nn.gelu": _elementwise(ACTIVATIONS["gelu"]),
    "relax.nn.gelu_tanh": _elementwise(ACTIVATIONS["gelu_tanh"]),
}
"""Operators that take the time, as torch computes them."""
