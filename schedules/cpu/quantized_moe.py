"""``llmc.quantized_moe`` on a CPU: the pairs are sorted by expert, and each expert's rows go through the kernels of quantized
linear layers, those of panels with rounded activations or those of plain codes.

Five stages in one kernel: a counting sort; gate and up of the sorted pairs, in parallel over pieces of the matrices, each of which
reads every routed expert's piece once; the gate; down alike; the weighted sum of a row's experts, in the order of its ``ids``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.dialect.quantized_moe import OP, STACKS, shape_of
from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import layout_panel, layout_plain, quantized_linear, quantized_linear_plain
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, each_vector, f32, function, i64, local, read, shuffle, store
from llmc.schedules.cpu.expert_groups import Groups, gated
from llmc.schedules.cpu.math import ACTIVATIONS
from llmc.schedules.layouts import stack_parts, unpack_stack
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.quantized_moe"
LAYOUTS = {module.NAME: module for module in (layout_panel, layout_plain)}
KERNELS: dict[str, Any] = {layout_panel.NAME: quantized_linear, layout_plain.NAME: quantized_linear_plain}


def _call(h: int, i: int, experts: int, top_k: int, up: str, down: str, **attrs: Any) -> KernelCall:
    full = {
        "top_k": top_k, "activation": "silu", "gated": 1, "interleave": 0, "bias": 0, "alpha": 1.0, "limit": 0.0, "offset": 0.0,
        "experts": experts, "hidden": h, "inner": i, "activations": "int8", "gate_up_scheme": up, "down_scheme": down, **attrs,
    }  # fmt: skip
    x = TensorSpec(("n", h), "float32")
    args = [x, TensorSpec(("n", top_k), "int32"), TensorSpec(("n", top_k), "float32")]
    for stack in STACKS:
        how, (o, k) = scheme(full[f"{stack}_scheme"]), shape_of(full, stack)
        layout = layout_panel if how.kind == "int" else layout_plain
        full[f"{stack}_layout"] = layout.NAME
        args += stack_parts(layout, how, experts, o, k).values()
    if full["bias"]:
        args += [TensorSpec((experts, shape_of(full, stack)[0]), "float32") for stack in STACKS]
    return KernelCall(OP, tuple(args), x, tuple(sorted(full.items())))


SHAPES: dict[str, KernelCall] = {
    "int4_two_of_eight_64x96": _call(64, 96, 8, 2, "int4_g32", "int4_g32"),
    "odd_57x19_int8": _call(57, 19, 5, 3, "int8", "int8", activation="gelu_tanh"),
    "clipped_gate_64x40_mxfp4": _call(64, 40, 4, 2, "mxfp4", "mxfp4", interleave=1, bias=1, alpha=1.702, limit=0.5, offset=1.0),
    "plain_32x13_zero_points": _call(32, 13, 3, 1, "int4p_g32", "fp8_e4m3", gated=0, activation="relu2", bias=1),
    "interleaved_q4_k_256x24": _call(256, 24, 4, 2, "q4_k", "q4_0", interleave=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.attr("activation") not in ACTIVATIONS:
        return None
    layouts = [call.attr(f"{stack}_layout") for stack in STACKS]
    if any(layout not in LAYOUTS for layout in layouts):
        return None
    if layout_panel.NAME in layouts and call.attr("activations") != "int8":
        return None
    if any(a.dtype != "float32" for a in (call.args[0], call.args[2], call.result)):
        return None
    return (
        f"pairs sorted by expert, {' and '.join(str(call.attr(f'{stack}_scheme')) for stack in STACKS)} in {' and '.join(layouts)}"
    )


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``rows``: rows of a register tile."""
    return {"rows": [12, 8] if Simd(target).registers >= 32 else [4, 2]}


@dataclass(frozen=True)
class _Of:
    """A stack of tensors as one of them: the buffer with its first index given."""

    buffer: Expr
    first: Expr

    @property
    def ty(self) -> Any:
        return self.buffer.ty

    def __getitem__(self, index: Any) -> Expr:
        return self.buffer[(self.first, *(index if isinstance(index, tuple) else (index,)))]


@dataclass(frozen=True)
class _Sorted:
    """x [n, h] as the rows of the sorted pairs."""

    buffer: Expr
    order: Expr
    top_k: int

    @property
    def ty(self) -> Any:
        return self.buffer.ty

    def __getitem__(self, index: tuple[Expr, Expr]) -> Expr:
        row, column = index
        return self.buffer[tirx.floordiv(read(self.order, row), self.top_k), column]


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols, names = Symbols(), _names(call)
    with function(f"quantized_moe_{call.attr('experts')}x{call.attr('hidden')}") as done:
        buffers = dict(zip(names, arguments(symbols, **dict(zip(names, (*call.args, call.result), strict=True))), strict=True))
        _Moe(call, target, buffers, symbols.dim(call.args[0].shape[0]), int(config["rows"])).emit()
    return done()


class _Moe:
    """Emits the stages. Rows of the workspaces are the sorted pairs."""

    def __init__(self, call: KernelCall, target: Target, buffers: dict[str, Expr], n: Expr, rows: int) -> None:
        self.call, self.target, self.simd, self.buffers, self.n = call, target, Simd(target), buffers, n
        self.rows = rows
        self.top_k, self.experts = int(call.attr("top_k")), int(call.attr("experts"))
        self.hidden, self.inner = int(call.attr("hidden")), int(call.attr("inner"))
        self.pairs = n * self.top_k
        self.groups = Groups(buffers["ids"], n, self.top_k, self.experts)
        self.place = T.alloc_buffer((self.pairs,), "int64")

    def emit(self) -> None:
        wide, _ = shape_of(dict(self.call.attrs), "gate_up")
        raw = T.alloc_buffer((self.pairs, wide), "float32")
        activated = T.alloc_buffer((self.pairs, self.inner), "float32")
        parts = T.alloc_buffer((self.pairs, self.hidden), "float32")
        self.groups.emit()
        with T.serial(0, self.pairs) as p:
            store(self.place, i64(p), read(self.groups.order, i64(p)))
        self._product("gate_up", _Sorted(self.buffers["x"], self.groups.order, self.top_k), raw)
        self._gate(raw, activated)
        self._product("down", activated, parts)
        self._combine(parts)

    def _product(self, stack: str, x: Expr, out: Expr) -> None:
        """out[pair] = W[expert of the pair] · x[pair] + bias."""
        o, k = shape_of(dict(self.call.attrs), stack)
        layout = self.call.attr(f"{stack}_layout")
        linear = _linear(self.call, stack)
        kernel = KERNELS[layout].rows_kernel(linear, self.target, x, out, self.pairs)
        stacked = {name: self.buffers[f"{stack}.{name}"] for name in stack_parts(LAYOUTS[layout], _how(self.call, stack), 1, o, k)}
        if self.call.attr("bias"):
            stacked["bias"] = self.buffers[f"{stack}_bias"]
        with T.parallel(0, tirx.const(kernel.pieces, "int64")) as index:
            piece = bind(i64(index))
            with T.serial(0, self.experts) as e:
                expert = bind(i64(e))
                emit = kernel.of({name: _Of(buffer, expert) for name, buffer in stacked.items()})
                self._tiles(expert, partial(emit, piece))

    def _tiles(self, expert: Expr, emit: Callable[[Expr, int], None]) -> None:
        """The rows of an expert in tiles, then one by one."""
        low, end = self.groups.range(expert)
        for count in (self.rows, 1):
            tiles = bind(tirx.floordiv(end - low, count))
            with T.serial(0, tiles) as i:
                emit(bind(low + i64(i) * count), count)
            low = bind(low + tiles * count)

    def _gate(self, raw: Expr, activated: Expr) -> None:
        with T.parallel(0, self.pairs) as p:
            pair = bind(i64(p))

            def piece(start: Expr, lanes: int) -> None:
                if not self.call.attr("gated"):
                    gate, up = bind(read(raw, pair, start, lanes=lanes)), None
                elif self.call.attr("interleave"):
                    both = bind(read(raw, pair, start * 2, lanes=2 * lanes))
                    gate, up = (bind(shuffle([both], range(first, 2 * lanes, 2))) for first in (0, 1))
                else:
                    gate, up = (bind(read(raw, pair, start + first, lanes=lanes)) for first in (0, self.inner))
                store(activated, gated(self.simd, self.call, gate, up, lanes), pair, start, lanes=lanes)

            each_vector(self.inner, self.simd.lanes, piece)

    def _combine(self, parts: Expr) -> None:
        """out[row] = the sum of its experts' results, each times its weight."""
        with T.parallel(0, self.n) as r:
            row = bind(i64(r))

            def piece(start: Expr, lanes: int) -> None:
                total = local(lanes)
                store(total, self.simd.splat(f32(0.0), lanes), 0, lanes=lanes)
                with T.serial(0, self.top_k) as j:
                    weight = self.simd.splat(self.simd.load(self.buffers["weights"], row, i64(j)), lanes)
                    part = read(parts, read(self.place, row * self.top_k + i64(j)), start, lanes=lanes)
                    store(total, self.simd.fma(weight, part, read(total, 0, lanes=lanes)), 0, lanes=lanes)
                store(self.buffers["out"], read(total, 0, lanes=lanes), row, start, lanes=lanes)

            each_vector(self.hidden, self.simd.lanes, piece)


def _how(call: KernelCall, stack: str) -> Any:
    return scheme(call.attr(f"{stack}_scheme"))


def _linear(call: KernelCall, stack: str) -> KernelCall:
    """The linear layer that one expert's matrix of ``stack`` is."""
    o, k = shape_of(dict(call.attrs), stack)
    layout = call.attr(f"{stack}_layout")
    args = [TensorSpec(("n", k), "float32"), *LAYOUTS[layout].parts(_how(call, stack), o, k).values()]
    attrs = {
        "activation": "none", "residual": 0, "bias": call.attr("bias"), "scheme": call.attr(f"{stack}_scheme"), "layout": layout,
        "o": o, "k": k,
    }  # fmt: skip
    if call.attr("bias"):
        args.append(TensorSpec((o,), "float32"))
    return KernelCall("llmc.quantized_linear", tuple(args), TensorSpec(("n", o), "float32"), tuple(sorted(attrs.items())))


def _names(call: KernelCall) -> list[str]:
    names = ["x", "ids", "weights"]
    for stack in STACKS:
        layout = LAYOUTS[call.attr(f"{stack}_layout")]
        names += [f"{stack}.{name}" for name in layout.parts(_how(call, stack), *shape_of(dict(call.attrs), stack))]
    return [*names, *(f"{stack}_bias" for stack in STACKS if call.attr("bias")), "out"]


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.moe import reference as moe_reference

    named = dict(zip(_names(call), arrays, strict=False))
    dense = []
    for stack in STACKS:
        o, k = shape_of(dict(call.attrs), stack)
        layout = LAYOUTS[call.attr(f"{stack}_layout")]
        parts = {name: named[f"{stack}.{name}"] for name in layout.parts(_how(call, stack), o, k)}
        dense.append(unpack_stack(layout, parts, _how(call, stack), o, k).dequantize().reshape(call.attr("experts"), o, k))
    attrs = {name: call.attr(name) for name in ("activation", "gated", "interleave", "alpha", "limit", "offset")}
    biases = [named[f"{stack}_bias"] for stack in STACKS if call.attr("bias")]
    return moe_reference(named["x"], named["ids"], named["weights"], *dense, *biases, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every expert that the step can route to is read once."""
    n, top_k = call.args[1].bind(symbols)
    sizes = [shape_of(dict(call.attrs), stack) for stack in STACKS]
    bits = sum(o * k * _how(call, stack).bits_per_weight(k) for stack, (o, k) in zip(STACKS, sizes, strict=True))
    weights = sum(o * k for o, k in sizes)
    return int(min(call.attr("experts"), n * top_k) * bits / 8) + 8 * n * call.attr("hidden"), 2 * n * top_k * weights
