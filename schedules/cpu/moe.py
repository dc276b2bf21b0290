"""``llmc.moe`` on a CPU: the (token, expert) pairs are grouped by expert, so that an expert's weights are read once per step.

Three stages in one kernel: a counting sort of the pairs by expert; the hidden values, in parallel over blocks of the
intermediate size; the outputs, in parallel over blocks of the hidden size. Only routed experts are read. A token's experts are
summed in the order of its ``ids``, whatever order they were computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.dot import dot_tile, output_blocks, tile_shape
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, f32, function, i64, local, read, shuffle, store, when
from llmc.schedules.cpu.expert_groups import Groups, gated
from llmc.schedules.cpu.math import ACTIVATIONS
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.moe"
OP = "llmc.moe"
STORAGE = ("float32", "float16", "bfloat16")


def _call(h: int, i: int, experts: int, top_k: int, dtype: str = "float32", **attrs: Any) -> KernelCall:
    full = {
        "top_k": top_k,
        "activation": "silu",
        "gated": 1,
        "interleave": 0,
        "bias": 0,
        "alpha": 1.0,
        "limit": 0.0,
        "offset": 0.0,
        **attrs,
    }
    wide = 2 * i if full["gated"] else i
    x = TensorSpec(("n", h), "float32")
    args = [x, TensorSpec(("n", top_k), "int32"), TensorSpec(("n", top_k), "float32")]
    args += [TensorSpec((experts, wide, h), dtype), TensorSpec((experts, h, i), dtype)]
    if full["bias"]:
        args += [TensorSpec((experts, wide), "float32"), TensorSpec((experts, h), "float32")]
    return KernelCall(OP, tuple(args), x, tuple(sorted(full.items())))


SHAPES: dict[str, KernelCall] = {
    "two_of_eight": _call(64, 96, 8, 2),
    "odd_57_19": _call(57, 19, 5, 3, "bfloat16", activation="gelu_tanh"),
    "interleaved_bias": _call(36, 20, 4, 2, "float16", interleave=1, bias=1),
    "clipped_gate": _call(40, 22, 4, 2, interleave=1, bias=1, alpha=1.702, limit=0.5, offset=1.0),
    "plain": _call(24, 13, 3, 1, gated=0, activation="relu2", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.attr("activation") not in ACTIVATIONS:
        return None
    floats = [call.args[2], *call.args[3:]]
    if call.args[0].dtype != "float32" or call.args[1].dtype != "int32" or any(a.dtype not in STORAGE for a in floats):
        return None
    return f"pairs grouped by expert, {call.args[3].dtype} weights in place"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    names = ["x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
    symbols = Symbols()
    with function(f"moe_{call.args[3].shape[0]}x{call.args[0].shape[1]}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        _Moe(call, Simd(target), buffers, symbols.dim(call.args[0].shape[0])).emit()
    return done()


class _Moe:
    """Emits the stages; a *pair* is row * top_k + j."""

    def __init__(self, call: KernelCall, simd: Simd, buffers: dict[str, Expr], n: Expr) -> None:
        self.call, self.simd, self.buffers, self.n = call, simd, buffers, n
        self.experts, self.h, self.inner = (int(d) for d in call.args[4].shape)
        self.top_k, self.gated = int(call.attr("top_k")), bool(call.attr("gated"))
        self.tile = tile_shape(simd)
        self.hidden = T.alloc_buffer((n * self.top_k, self.inner), "float32")
        self.parts = T.alloc_buffer((n * self.top_k, self.h), "float32")
        self.groups = Groups(buffers["ids"], n, self.top_k, self.experts)

    def emit(self) -> None:
        self.groups.emit()
        self._over_blocks(self.inner, self.tile.outputs // 2 if self.gated else self.tile.outputs, self._hidden_block)
        self._over_blocks(self.h, self.tile.outputs, self._output_block)

    def _over_blocks(self, size: int, width: int, body: Callable[[Expr, int], None]) -> None:
        """Run ``body(first, outputs)`` in parallel over the output blocks of a stage."""
        full, rest = size // width, output_blocks(size, width)

        def remainder() -> None:
            for start, outputs in rest:
                body(i64(start), outputs)

        with T.parallel(0, i64(full + (1 if rest else 0))) as b:
            if not rest:
                body(b * width, width)
            elif full == 0:
                remainder()
            else:
                when(b < full, lambda: body(b * width, width), remainder)

    def _each_tile(self, body: Callable[[Expr, Sequence[Expr]], None]) -> None:
        """Run ``body(expert, pairs)`` over tiles of the pairs of each routed expert."""
        with T.serial(0, self.experts) as e:
            expert = bind(i64(e))
            begin, end = self.groups.range(expert)
            tiles = bind(tirx.floordiv(end - begin, self.tile.rows))
            with T.serial(0, tiles) as t:
                body(expert, [bind(read(self.groups.order, begin + i64(t) * self.tile.rows + i)) for i in range(self.tile.rows)])
            with T.serial(begin + tiles * self.tile.rows, end) as p:
                body(expert, [bind(read(self.groups.order, i64(p)))])

    def _hidden_block(self, first: Expr, outputs: int) -> None:
        """hidden[pair, first .. first + outputs] = act(gate) · up, or act(gate) if there is no up."""
        gates = [first + j for j in range(outputs)]
        ups: list[Expr] = []
        if self.gated:
            interleave = bool(self.call.attr("interleave"))
            ups = [2 * g + 1 if interleave else g + self.inner for g in gates]
            gates = [2 * g if interleave else g for g in gates]

        def tile(expert: Expr, pairs: Sequence[Expr]) -> None:
            x_rows = [(tirx.floordiv(p, self.top_k),) for p in pairs]
            w_rows = [(expert, row) for row in [*gates, *ups]]
            sums = dot_tile(self.simd, self.buffers["x"], x_rows, self.buffers["gate_up"], w_rows, self.h)
            for pair, value in zip(pairs, sums, strict=True):
                if "gate_up_bias" in self.buffers:
                    bias = [self.simd.load(self.buffers["gate_up_bias"], *row) for row in w_rows]
                    value = bind(value + (shuffle(bias, range(len(bias))) if len(bias) > 1 else bias[0]))
                gate = shuffle([value], range(outputs)) if self.gated else value
                up = shuffle([value], range(outputs, 2 * outputs)) if self.gated else None
                store(self.hidden, gated(self.simd, self.call, gate, up, outputs), pair, first, lanes=outputs)

        self._each_tile(tile)

    def _output_block(self, first: Expr, outputs: int) -> None:
        """parts[pair, block] = down · hidden, then out[row, block] = the weighted sum over the row's experts."""

        def tile(expert: Expr, pairs: Sequence[Expr]) -> None:
            w_rows = [(expert, first + j) for j in range(outputs)]
            sums = dot_tile(self.simd, self.hidden, [(p,) for p in pairs], self.buffers["down"], w_rows, self.inner)
            for pair, value in zip(pairs, sums, strict=True):
                if "down_bias" in self.buffers:
                    value = value + self.simd.load(self.buffers["down_bias"], expert, first, lanes=outputs)
                store(self.parts, value, pair, first, lanes=outputs)

        self._each_tile(tile)
        total = local(outputs)
        with T.serial(0, self.n) as r:
            row = bind(i64(r))
            store(total, self.simd.splat(f32(0.0), outputs), 0, lanes=outputs)
            with T.serial(0, self.top_k) as j:
                weight = self.simd.splat(self.simd.load(self.buffers["weights"], row, i64(j)), outputs)
                part = read(self.parts, row * self.top_k + i64(j), first, lanes=outputs)
                store(total, self.simd.fma(weight, part, read(total, 0, lanes=outputs)), 0, lanes=outputs)
            store(self.buffers["out"], read(total, 0, lanes=outputs), row, first, lanes=outputs)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.moe import reference as moe_reference

    attrs = {name: call.attr(name) for name in ("activation", "gated", "interleave", "alpha", "limit", "offset")}
    return moe_reference(*arrays, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every expert that the step can route to is read once."""
    n, top_k = call.args[1].bind(symbols)
    experts, h, inner = (int(d) for d in call.args[4].shape)
    wide = int(call.args[3].shape[1])
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[call.args[3].dtype]
    weights = min(experts, n * top_k) * h * (wide + inner) * width
    return weights + 8 * n * h, 2 * n * top_k * h * (wide + inner)
