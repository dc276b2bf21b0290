"""``llmc.moe`` on a GPU, simple: one warp computes one value, first of the hidden layer of each (token, expert) pair, then of the
result. Only routed experts are read; a token's experts are summed in the order of its ``ids``.

Two kernels and a workspace for the hidden values. It reads an expert's weights once per pair: at the memory limit for a few tokens,
far from the compute limit for many.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cuda.emit import (
    STORAGE,
    WARP,
    Symbols,
    arguments,
    bind,
    ceildiv,
    common_lanes,
    f32,
    function,
    i64,
    launch,
    load,
    registers,
    store,
    warp_sum,
    when,
)
from llmc.schedules.cuda.math import ACTIVATIONS, activate
from llmc.schedules.gpu import moe as portable
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.moe"
OP = "llmc.moe"
WARPS = 4
"""Warps of a thread block; each computes one value."""


SHAPES = portable.SHAPES


def matches(call: KernelCall, target: Target) -> str | None:
    floats = [a for i, a in enumerate(call.args) if i != 1]
    if call.op != OP or target.kind != "cuda" or call.attr("activation") not in ACTIVATIONS:
        return None
    if call.args[1].dtype != "int32" or any(a.dtype not in STORAGE for a in floats):
        return None
    return f"one warp a value, {call.args[3].dtype} weights in place"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    names = ["x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
    symbols = Symbols()
    with function(f"moe_{call.args[3].shape[0]}x{call.args[0].shape[1]}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        _Moe(call, buffers, symbols.dim(call.args[0].shape[0])).emit()
    return done()


class _Moe:
    """Emits the two kernels; a *pair* is row * top_k + j."""

    def __init__(self, call: KernelCall, buffers: dict[str, Expr], n: Expr) -> None:
        self.call, self.buffers, self.n = call, buffers, n
        _, self.h, self.inner = (int(d) for d in call.args[4].shape)
        self.top_k, self.gated = int(call.attr("top_k")), bool(call.attr("gated"))
        self.hidden = T.alloc_buffer((n * self.top_k, self.inner), "float32", scope="global")

    def emit(self) -> None:
        with launch(ceildiv(i64(self.inner), WARPS), WARPS * WARP, self.n * self.top_k) as (thread, block, pair):
            index = bind(block * WARPS + i64(tirx.floordiv(thread, WARP)))
            when(index < self.inner, lambda: self._hidden_value(thread, pair, index))
        with launch(ceildiv(i64(self.h), WARPS), WARPS * WARP, self.n) as (thread, block, row):
            index = bind(block * WARPS + i64(tirx.floordiv(thread, WARP)))
            when(index < self.h, lambda: self._output_value(thread, row, index))

    def _dot(self, thread: Expr, x: Expr, x_row: Expr, weight: Expr, w_row: tuple[Expr, Expr], k: int) -> Expr:
        """weight[w_row] · x[x_row], in every lane of the warp."""
        lanes = common_lanes([str(b.ty.dtype) for b in (x, weight)], k)
        total = registers(1)
        store(total, f32(0.0), 0)
        lane = bind(i64(tirx.floormod(thread, WARP)))
        with T.serial(0, tirx.const(-(-k // (lanes * WARP)), "int64")) as step:
            at = bind((i64(step) * WARP + lane) * lanes)

            def add() -> None:
                for a, b in zip(load(x, x_row, at, lanes=lanes), load(weight, *w_row, at, lanes=lanes), strict=True):
                    store(total, total[0] + a * b, 0)

            when(at < k, add)
        return warp_sum(total[0])

    def _expert(self, row: Expr, j: Expr) -> Expr:
        return bind(i64(self.buffers["ids"][row, j]))

    def _hidden_value(self, thread: Expr, pair: Expr, index: Expr) -> None:
        """hidden[pair, index] = act(gate) · up, or act(gate) if there is no up."""
        b = self.buffers
        row, j = bind(tirx.floordiv(pair, self.top_k)), bind(tirx.floormod(pair, self.top_k))
        expert = self._expert(row, j)
        interleave = bool(self.call.attr("interleave"))
        places = [index]
        if self.gated:
            places = [2 * index, 2 * index + 1] if interleave else [index, index + self.inner]
        sums = [self._dot(thread, b["x"], row, b["gate_up"], (expert, place), self.h) for place in places]
        if "gate_up_bias" in b:
            sums = [bind(s + load(b["gate_up_bias"], expert, place)[0]) for s, place in zip(sums, places, strict=True)]
        value = self._gated(sums[0], sums[1] if self.gated else None)
        when(tirx.floormod(thread, WARP).equal(0), lambda: store(self.hidden, value, pair, index))

    def _gated(self, gate: Expr, up: Expr | None) -> Expr:
        """act(alpha · gate) / alpha * (up + offset), clipped first if there is a limit."""
        alpha, limit, offset = (float(self.call.attr(name)) for name in ("alpha", "limit", "offset"))
        if limit > 0:
            gate = bind(tirx.min(gate, f32(limit)))
            up = None if up is None else bind(tirx.max(tirx.min(up, f32(limit)), f32(-limit)))
        value = activate(self.call.attr("activation"), bind(gate * f32(alpha))) * f32(1 / alpha)
        return bind(value if up is None else value * (up + f32(offset)))

    def _output_value(self, thread: Expr, row: Expr, index: Expr) -> None:
        """out[row, index] = Σ_j weights[row, j] · (down[e_j, index] · hidden + bias)."""
        b = self.buffers
        total = registers(1)
        store(total, f32(0.0), 0)
        with T.serial(0, tirx.const(self.top_k, "int64")) as j:
            expert = self._expert(row, j)
            part = self._dot(thread, self.hidden, row * self.top_k + j, b["down"], (expert, index), self.inner)
            if "down_bias" in b:
                part = bind(part + load(b["down_bias"], expert, index)[0])
            store(total, total[0] + load(b["weights"], row, j)[0] * part, 0)
        result = total[0]
        dtype = self.call.result.dtype
        value = result if dtype == "float32" else tirx.Cast(dtype, result)
        when(tirx.floormod(thread, WARP).equal(0), lambda: store(b["out"], value, row, index))


reference, roofline = portable.reference, portable.roofline
