"""``llmc.rms_norm`` and ``llmc.layer_norm`` on any GPU: a row is read once, kept in registers, reduced and written.

A row takes as many neighbouring threads as keep about ``VALUES_PER_THREAD`` values each; short rows share a thread block.
Statistics are float32. The order of a row's additions depends on its length alone, so a row has the same bits in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.gpu.emit import (
    WIDTH,
    Symbols,
    Team,
    arguments,
    await_predecessor,
    bind,
    ceildiv,
    common_lanes,
    each,
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
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
VALUES_PER_THREAD = 8
BLOCK = 128
"""Threads of a block that several rows share."""


def _rms(shape: tuple[int | str, ...], offset: float = 0.0, dtype: str = "bfloat16", weight: str = "bfloat16") -> KernelCall:
    x = TensorSpec(shape, dtype)
    return KernelCall("llmc.rms_norm", (x, TensorSpec(shape[-1:], weight)), x, (("eps", 1e-5), ("offset", offset)))


def _layer(shape: tuple[int | str, ...], dtype: str = "bfloat16", weight: str = "bfloat16") -> KernelCall:
    x, w = TensorSpec(shape, dtype), TensorSpec(shape[-1:], weight)
    return KernelCall("llmc.layer_norm", (x, w, w), x, (("eps", 1e-5),))


@dataclass(frozen=True)
class Norm:
    """The family of one of the two ops; they differ in the mean and the bias only."""

    NAME: str
    OP: str
    SHAPES: dict[str, KernelCall]
    centred: bool

    def matches(self, call: KernelCall, target: Target) -> str | None:
        if call.op != self.OP or not storable(call, target) or not all(isinstance(d, int) for d in call.args[0].shape[1:]):
            return None
        return "a row in the registers of a group of threads, float32 statistics"

    def space(self, call: KernelCall, target: Target) -> dict[str, list[Any]]:
        return {}

    def build(self, call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
        symbols = Symbols()
        x = call.args[0]
        d = int(x.shape[-1])
        names = ["x", "weight", "bias"][: len(call.args)]
        specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
        group = row_threads(d, target)
        threads = max(group, min(BLOCK, target.max_threads))
        per_block = threads // group
        with function(f"{self.OP.removeprefix('llmc.')}_{d}") as done:
            buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
            rows = symbols.dim(x.shape[0]) * prod(int(s) for s in x.shape[1:-1])
            with launch(ceildiv(rows, per_block), threads) as (thread, block):
                row = bind(block * per_block + i64(tirx.floordiv(thread, group)))
                # Threads without a row work on the last one, so that all take part in the sums.
                inside = _index(bind(tirx.min(row, rows - 1)), x)
                team = Team(target, thread, threads, group)
                self._row(call, buffers, inside, team, bind(tirx.floormod(thread, group)), group, row < rows)
        return done()

    def _row(
        self, call: KernelCall, buffers: dict[str, Expr], row: list[Expr], team: Team, lane: Expr, group: int, exists: Expr
    ) -> None:
        d = int(call.args[0].shape[-1])
        lanes = _lanes(call, team)
        steps = -(-d // (group * lanes))
        held = registers(steps * lanes, start=0.0)
        # Weights come from memory, x from a cache: they are on their way before x is there.
        parameters = {name: registers(steps * lanes) for name in buffers if name in ("weight", "bias")}

        def read_parameters(item: Expr, step: int) -> None:
            for name, kept in parameters.items():
                for i, value in enumerate(load(buffers[name], item * lanes, lanes=lanes)):
                    store(kept, value, step * lanes + i)

        each(lane, group, d // lanes, read_parameters)
        await_predecessor(team.target)

        def read_piece(item: Expr, step: int) -> None:
            for i, value in enumerate(load(buffers["x"], *row, item * lanes, lanes=lanes)):
                store(held, value, step * lanes + i)

        each(lane, group, d // lanes, read_piece)

        def mean_of(term: Any) -> Expr:
            """The mean over the row of ``term(value)``."""
            total = registers(1, start=0.0)

            def add(item: Expr, step: int) -> None:
                for i in range(lanes):
                    store(total, total[0] + term(held[step * lanes + i]), 0)

            each(lane, group, d // lanes, add)
            return bind(team.sum(total[0], group) * f32(1.0 / d))

        mean = mean_of(lambda v: v) if self.centred else f32(0.0)
        variance = mean_of(lambda v: (v - mean) * (v - mean) if self.centred else v * v)
        scale = bind(f32(1.0) / tirx.sqrt(variance + f32(call.attr("eps"))))

        def write_piece(item: Expr, step: int) -> None:
            values, weights = ([kept[step * lanes + i] for i in range(lanes)] for kept in (held, parameters["weight"]))
            if self.centred:
                biases = [parameters["bias"][step * lanes + i] for i in range(lanes)]
                values = [(v - mean) * scale * w + b for v, w, b in zip(values, weights, biases, strict=True)]
            else:
                values = [v * scale * (w + f32(call.attr("offset"))) for v, w in zip(values, weights, strict=True)]
            store_all(buffers["out"], values, *row, item * lanes)

        when(exists, lambda: each(lane, group, d // lanes, write_piece))

    def reference(self, call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
        from llmc.dialect import norm

        f = norm.layer_norm_reference if self.centred else norm.rms_norm_reference
        return f(*arrays, **dict(call.attrs))

    def roofline(self, call: KernelCall, **symbols: int) -> tuple[int, int]:
        size = int(np.prod(call.args[0].bind(symbols)))
        moved = size * (WIDTH[call.args[0].dtype] + WIDTH[call.result.dtype])
        return moved + sum(int(a.shape[0]) * WIDTH[a.dtype] for a in call.args[1:]), (8 if self.centred else 4) * size


def row_threads(d: int, target: GpuTarget) -> int:
    """Threads for a row of ``d`` values: at least 8, at most a thread block."""
    threads = 8
    while threads * VALUES_PER_THREAD < d and threads < target.max_threads:
        threads *= 2
    return threads


def _lanes(call: KernelCall, team: Team) -> int:
    return common_lanes(team.target, [s.dtype for s in (*call.args, call.result)], int(call.args[0].shape[-1]))


def _index(row: Expr, x: TensorSpec) -> list[Expr]:
    """The index prefix of flattened row ``row``."""
    index: list[Expr] = []
    for dim in reversed(x.shape[1:-1]):
        index.insert(0, tirx.floormod(row, int(dim)))
        row = tirx.floordiv(row, int(dim))
    return [row, *index]


rms_norm = Norm(
    NAME="gpu.rms_norm",
    OP="llmc.rms_norm",
    centred=False,
    SHAPES={
        "hidden_4096": _rms(("n", 4096)),
        "odd_57_f32": _rms(("n", 57), 1.0, "float32", "float32"),
        "heads_20": _rms(("n", 3, 20), 0.0, "float16", "float16"),
        "heads_128": _rms(("n", 2, 128), 1.0),
        "one": _rms(("n", 1), 0.0, "bfloat16", "float32"),
        "hidden_1000_ones": _rms(("n", 1000), 0.0, "bfloat16", "float32"),
    },
)
layer_norm = Norm(
    NAME="gpu.layer_norm",
    OP="llmc.layer_norm",
    centred=True,
    SHAPES={
        "hidden_768": _layer(("n", 768)),
        "odd_57": _layer(("n", 57), "float16", "float32"),
        "heads_12": _layer(("n", 3, 12), "float32", "float32"),
    },
)
