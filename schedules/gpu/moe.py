"""``llmc.moe`` on any GPU: one warp computes one value, first of the hidden layer of each (token, expert) pair, then of the
result. Only routed experts are read; a token's experts are summed in the order of its ``ids``.

Two kernels and a workspace for the hidden values. It reads an expert's weights once per pair: at the memory limit for a few tokens,
far from the compute limit for many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu.emit import (
    WIDTH,
    Symbols,
    Team,
    arguments,
    bind,
    common_lanes,
    f32,
    function,
    i64,
    launch,
    load,
    registers,
    storable,
    store,
    store_all,
    when,
)
from llmc.schedules.gpu.math import ACTIVATIONS, activate
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.moe"
OP = "llmc.moe"
BLOCK = 128
"""Threads of a block; each of its warps computes one value."""


def _call(h: int, i: int, experts: int, top_k: int, dtype: str = "bfloat16", **attrs: Any) -> KernelCall:
    full = {
        "top_k": top_k, "activation": "silu", "gated": 1, "interleave": 0, "bias": 0, "alpha": 1.0, "limit": 0.0, "offset": 0.0,
        **attrs,
    }  # fmt: skip
    wide = 2 * i if full["gated"] else i
    x = TensorSpec(("n", h), dtype)
    args = [x, TensorSpec(("n", top_k), "int32"), TensorSpec(("n", top_k), dtype)]
    args += [TensorSpec((experts, wide, h), dtype), TensorSpec((experts, h, i), dtype)]
    if full["bias"]:
        args += [TensorSpec((experts, wide), dtype), TensorSpec((experts, h), dtype)]
    return KernelCall(OP, tuple(args), x, tuple(sorted(full.items())))


SHAPES: dict[str, KernelCall] = {
    "gated_64x96": _call(64, 96, 8, 2),
    "odd_57_19": _call(57, 19, 5, 3, activation="gelu_tanh"),
    "interleaved_bias": _call(36, 20, 4, 2, "float16", interleave=1, bias=1),
    "clipped_gate": _call(40, 22, 4, 2, "float32", interleave=1, bias=1, alpha=1.702, limit=0.5, offset=1.0),
    "plain": _call(24, 13, 3, 1, gated=0, activation="relu2", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not storable(call, target, ints=(1,)) or call.attr("activation") not in ACTIVATIONS:
        return None
    return f"one warp a value, {call.args[3].dtype} weights in place"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    names = ["x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
    symbols = Symbols()
    with function(f"moe_{call.args[3].shape[0]}x{call.args[0].shape[1]}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        _Moe(call, target, buffers, symbols.dim(call.args[0].shape[0])).emit()
    return done()


class _Moe:
    """Emits the two kernels; a *pair* is row * top_k + j."""

    def __init__(self, call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], n: Expr) -> None:
        self.call, self.target, self.buffers, self.n = call, target, buffers, n
        _, self.h, self.inner = (int(d) for d in call.args[4].shape)
        self.top_k, self.gated = int(call.attr("top_k")), bool(call.attr("gated"))
        self.warps = max(1, BLOCK // target.warp_size)
        self.hidden = T.alloc_buffer((n * self.top_k, self.inner), "float32", scope="global")

    def emit(self) -> None:
        self._values(self.inner, self.n * self.top_k, self._hidden_value)
        self._values(self.h, self.n, self._output_value)

    def _values(self, count: int, rows: Expr, value: Callable[[Team, Expr, Expr], Callable[[], None]]) -> None:
        """A kernel in which a warp computes ``value(team, row, index)`` for index < count; it returns what stores the result."""
        warp = self.target.warp_size
        # A grid is longest along x, and a long chunk has more pairs than the 65535 that there may be along y.
        with launch(rows, self.warps * warp, i64(-(-count // self.warps))) as (thread, row, block):
            team = Team(self.target, thread, self.warps * warp)
            index = bind(block * self.warps + i64(tirx.floordiv(thread, warp)))
            # A warp without a value works on the last one, so that all threads take part in the sums.
            write = value(team, row, bind(tirx.min(index, count - 1)))
            when(tirx.all(tirx.floormod(thread, warp).equal(0), index < count), write)

    def _dot(self, team: Team, x: Expr, x_row: Expr, weight: Expr, w_row: tuple[Expr, Expr], k: int) -> Expr:
        """weight[w_row] · x[x_row], in every lane of the warp."""
        warp = self.target.warp_size
        lanes = common_lanes(self.target, [str(b.ty.dtype) for b in (x, weight)], k)
        total = registers(1, start=0.0)
        lane = bind(i64(tirx.floormod(team.thread, warp)))
        with T.serial(0, tirx.const(-(-k // (lanes * warp)), "int64")) as step:
            at = bind((i64(step) * warp + lane) * lanes)

            def add() -> None:
                for a, b in zip(load(x, x_row, at, lanes=lanes), load(weight, *w_row, at, lanes=lanes), strict=True):
                    store(total, total[0] + a * b, 0)

            when(at < k, add)
        return team.sum(total[0], warp)

    def _expert(self, row: Expr, j: Expr) -> Expr:
        return bind(i64(self.buffers["ids"][row, j]))

    def _hidden_value(self, team: Team, pair: Expr, index: Expr) -> Callable[[], None]:
        """hidden[pair, index] = act(gate) · up, or act(gate) if there is no up."""
        b = self.buffers
        row, j = bind(tirx.floordiv(pair, self.top_k)), bind(tirx.floormod(pair, self.top_k))
        expert = self._expert(row, j)
        interleave = bool(self.call.attr("interleave"))
        places = [index]
        if self.gated:
            places = [2 * index, 2 * index + 1] if interleave else [index, index + self.inner]
        sums = [self._dot(team, b["x"], row, b["gate_up"], (expert, place), self.h) for place in places]
        if "gate_up_bias" in b:
            sums = [bind(s + load(b["gate_up_bias"], expert, place)[0]) for s, place in zip(sums, places, strict=True)]
        value = gated(self.call, sums[0], sums[1] if self.gated else None)
        return lambda: store(self.hidden, value, pair, index)

    def _output_value(self, team: Team, row: Expr, index: Expr) -> Callable[[], None]:
        """out[row, index] = Σ_j weights[row, j] · (down[e_j, index] · hidden + bias)."""
        b = self.buffers
        total = registers(1, start=0.0)
        with T.serial(0, tirx.const(self.top_k, "int64")) as j:
            expert = self._expert(row, j)
            part = self._dot(team, self.hidden, row * self.top_k + j, b["down"], (expert, index), self.inner)
            if "down_bias" in b:
                part = bind(part + load(b["down_bias"], expert, index)[0])
            store(total, total[0] + load(b["weights"], row, j)[0] * part, 0)
        return lambda: store_all(b["out"], [total[0]], row, index)


def gated(call: KernelCall, gate: Expr, up: Expr | None) -> Expr:
    """act(alpha · gate) / alpha * (up + offset), clipped first if there is a limit."""
    alpha, limit, offset = (float(call.attr(name)) for name in ("alpha", "limit", "offset"))
    if limit > 0:
        gate = bind(tirx.min(gate, f32(limit)))
        up = None if up is None else bind(tirx.max(tirx.min(up, f32(limit)), f32(-limit)))
    value = activate(call.attr("activation"), bind(gate * f32(alpha))) * f32(1 / alpha)
    return bind(value if up is None else value * (up + f32(offset)))


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.moe import reference as moe_reference

    attrs = {name: call.attr(name) for name in ("activation", "gated", "interleave", "alpha", "limit", "offset")}
    return moe_reference(*arrays, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every expert that the step can route to is read once."""
    n, top_k = call.args[1].bind(symbols)
    experts, h, inner = (int(d) for d in call.args[4].shape)
    wide = int(call.args[3].shape[1])
    width = WIDTH[call.args[3].dtype]
    weights = min(experts, n * top_k) * h * (wide + inner) * width
    return weights + 2 * WIDTH[call.args[0].dtype] * n * h, 2 * n * top_k * h * (wide + inner)
