"""``llmc.linear`` in the decode phase on any GPU: at the memory limit for a few rows, whatever the shape and dtype.

A group of neighbouring threads computes one output of up to ``rows`` rows: each weight is loaded once, in vectors, several loads
in flight, and multiplied by all of the rows; the group's sum ends it. More rows than that read the weights again. The group is as
wide as the row of weights keeps busy. The order of additions depends on k alone, so a row has the same bits in every batch.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import linear_call
from llmc.schedules.gpu.emit import (
    Symbols,
    Team,
    arguments,
    bind,
    ceildiv,
    common_lanes,
    function,
    i64,
    launch,
    load,
    registers,
    store,
    when,
)
from llmc.schedules.gpu.linear_call import make_call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.gemv"
OP = linear_call.OP
SMALLEST_GROUP = 8

SHAPES: dict[str, KernelCall] = {
    "square_4096": make_call(4096, 4096, "bfloat16", phase="decode"),
    "even_64x256": make_call(64, 256, "bfloat16", phase="decode"),
    "odd_19x57": make_call(19, 57, "float16", phase="decode", bias=1, residual=1, activation="silu"),
    "wide_9x1608_mixed": make_call(9, 1608, "float32", "bfloat16", phase="decode", activation="gelu"),
    "gated_38x64": make_call(38, 64, "bfloat16", phase="decode", bias=1, activation="silu_gated"),
    "one": make_call(1, 3, phase="decode"),
    "narrow_40x20": make_call(40, 20, "float16", "float16", phase="decode", out="float32", bias=1, activation="gelu_tanh"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or not linear_call.takes(call, target):
        return None
    return "a group of threads to an output, each weight read once for a few rows"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {"rows": [4, 1, 2, 8], "block": [128, 64, 256], "unroll": [4, 1, 2, 8]}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    o, k = (int(d) for d in call.args[1].shape)
    specs = linear_call.specs(call)
    lanes = common_lanes(target, [s.dtype for s in call.args[:2]], k)
    pieces, group = k // lanes, group_size(k // lanes, target)
    threads = max(group, min(config["block"], target.max_threads))
    outputs, sides, results = threads // group, 1 + linear_call.activation(call)[1], int(call.result.shape[1])
    with function(f"gemv_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        with launch(-(-results // outputs), threads, ceildiv(n, config["rows"])) as (thread, block, row_block):
            team, lane = Team(target, thread, threads, group), bind(i64(tirx.floormod(thread, group)))
            output = bind(block * outputs + i64(tirx.floordiv(thread, group)))
            # A group without an output, and rows that do not exist, work on the last one: all threads take part in the sums.
            lines = [bind(tirx.min(output, results - 1) + side * results) for side in range(sides)]
            rows = [bind(tirx.min(row_block * config["rows"] + r, n - 1)) for r in range(config["rows"])]
            sums = registers(len(rows) * sides, start=0.0)

            def piece(index: Expr) -> None:
                weights = [[bind(w) for w in load(buffers["weight"], line, index * lanes, lanes=lanes)] for line in lines]
                for r, row in enumerate(rows):
                    for e, x in enumerate(load(buffers["x"], row, index * lanes, lanes=lanes)):
                        for side in range(sides):
                            store(sums, sums[r * sides + side] + weights[side][e] * x, r * sides + side)

            whole, unroll = pieces // group, config["unroll"]
            if whole // unroll:
                with T.serial(0, whole // unroll) as step:
                    for part in range(unroll):
                        piece(bind((i64(step) * unroll + part) * group + lane))
            for step in range(whole - whole % unroll, whole):
                piece(bind(lane + step * group))
            if pieces % group:
                last = bind(lane + whole * group)
                when(last < pieces, lambda: piece(last))
            for r, row in enumerate(rows):
                totals = [team.sum(sums[r * sides + side], group) for side in range(sides)]

                def finish(row: Expr = row, totals: list[Expr] = totals) -> None:
                    linear_call.finish(call, buffers, totals[:1], row, output, totals[1:])

                when(tirx.all(lane.equal(0), output < results, row_block * len(rows) + r < n), finish)
    return done()


def group_size(pieces: int, target: GpuTarget) -> int:
    """The widest group, up to a warp, whose threads have at least one vector load each; fewer threads leave no one idle."""
    group = target.warp_size
    while group > SMALLEST_GROUP and pieces < group:
        group //= 2
    return group


reference, roofline = linear_call.reference, linear_call.roofline
