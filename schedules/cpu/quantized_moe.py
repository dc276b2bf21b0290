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

from llmc.dialect.quantized_moe import OP, STACKS
from llmc.passes.quantize.scheme import Scheme
from llmc.schedules import quantized_experts
from llmc.schedules.cpu import layout_panel, layout_plain, quantized_linear, quantized_linear_plain
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, each_vector, f32, function, i64, local, read, shuffle, store
from llmc.schedules.cpu.expert_groups import Groups, gated
from llmc.schedules.cpu.math import ACTIVATIONS
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.schedules.quantized_experts import Of
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.quantized_moe"
LAYOUTS = (layout_panel, layout_plain)
KERNELS: dict[str, Any] = {layout_panel.NAME: quantized_linear, layout_plain.NAME: quantized_linear_plain}


def _layout_for(how: Scheme) -> Any:
    return layout_panel if how.kind == "int" else layout_plain


def _call(h: int, i: int, experts: int, top_k: int, up: str, down: str, **attrs: Any) -> KernelCall:
    return quantized_experts.sample(h, i, experts, top_k, up, down, _layout_for, "float32", activations="int8", **attrs)


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
    if any(quantized_experts.layout_of(call, stack, LAYOUTS) is None for stack in STACKS):
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
    symbols, names = Symbols(), quantized_experts.operand_names(call, LAYOUTS)
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
        wide, _ = quantized_experts.shape(self.call, "gate_up")
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
        layout = self.call.attr(f"{stack}_layout")
        linear = _linear(self.call, stack)
        kernel = KERNELS[layout].rows_kernel(linear, self.target, x, out, self.pairs)
        names = quantized_experts.part_names(self.call, stack, LAYOUTS)
        stacked = {name: self.buffers[f"{stack}.{name}"] for name in names}
        if self.call.attr("bias"):
            stacked["bias"] = self.buffers[f"{stack}_bias"]
        with T.parallel(0, tirx.const(kernel.pieces, "int64")) as index:
            piece = bind(i64(index))
            with T.serial(0, self.experts) as e:
                expert = bind(i64(e))
                emit = kernel.of({name: Of(buffer, expert) for name, buffer in stacked.items()})
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


def _linear(call: KernelCall, stack: str) -> KernelCall:
    """The linear layer that one expert's matrix of ``stack`` is."""
    o, k = quantized_experts.shape(call, stack)
    layout = quantized_experts.layout_of(call, stack, LAYOUTS)
    assert layout is not None
    args = [TensorSpec(("n", k), "float32"), *layout.parts(quantized_experts.how(call, stack), o, k).values()]
    attrs = {
        "activation": "none", "residual": 0, "bias": call.attr("bias"), "scheme": call.attr(f"{stack}_scheme"),
        "layout": layout.NAME, "o": o, "k": k,
    }  # fmt: skip
    if call.attr("bias"):
        args.append(TensorSpec((o,), "float32"))
    return KernelCall("llmc.quantized_linear", tuple(args), TensorSpec(("n", o), "float32"), tuple(sorted(attrs.items())))


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    return quantized_experts.reference(call, LAYOUTS, *arrays)


roofline = quantized_experts.roofline
