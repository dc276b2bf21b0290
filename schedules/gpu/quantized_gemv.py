"""``llmc.quantized_linear`` in the decode phase on any GPU: each code is read once, in 16-byte loads, for a few rows.

32 neighbouring threads read a chunk of a tile of 16 weight rows as the layout :mod:`.layout_mma` has it: thread 4 g + t gets
columns of rows g and g + 8. It sums products of codes; scales, and what all codes of a group are off by, meet the sums of a unit of
eight columns. The chunks of a tile are shared out to the block's groups of 32, whose sums meet in shared memory. The order of
additions depends on k alone, so a row has the same bits in every batch.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import linear_call, quantized_call
from llmc.schedules.gpu.emit import (
    Symbols,
    Team,
    arguments,
    bind,
    ceildiv,
    each,
    function,
    i64,
    launch,
    read,
    registers,
    shared,
    store,
    sync,
    when,
)
from llmc.schedules.gpu.layout_mma import LANES, ROWS, UNIT
from llmc.schedules.gpu.operand import Floats
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.gpu.quantized_units import Units
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.quantized_gemv"
OP = quantized_call.OP
MEMBERS = 4
"""Threads that share a row of a chunk."""

SHAPES: dict[str, KernelCall] = {
    "square_4096_int4_g128": make(4096, 4096, "int4_g128"),
    "even_64x512_int4_g64": make(64, 512, "int4_g64"),
    "odd_19x57_q4_1_f16": make(19, 57, "q4_1", "float16", bias=1, residual=1, activation="silu"),
    "wide_9x600_zero_point_f32": make(9, 600, "int4p_g128", "float32", activation="gelu"),
    "one_int8": make(1, 3, "int8"),
    "edges_40x200_fp8": make(40, 200, "fp8_e4m3", out="float32"),
    "gated_96x264_int4": make(96, 264, "int4", activation="silu_gated", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or not quantized_call.takes(call, target):
        return None
    if linear_call.activation(call)[1] and int(call.result.shape[1]) % ROWS:
        return None  # a tile would have gates and factors
    return f"{call.attr('scheme')} codes in 16-byte loads, each read once for a few rows"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``rows`` of x for which codes are read once; ``groups`` of 32 threads that share a tile's columns."""
    assert isinstance(target, GpuTarget)
    return {"rows": [4, 1, 2], "groups": [g for g in (4, 8, 2) if g * LANES <= target.max_threads]}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols, how = Symbols(), quantized_call.how(call)
    o, k = int(call.attr("o")), int(call.attr("k"))
    specs = quantized_call.specs(call)
    with function(f"quantized_gemv_{how.name}_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        units = Units(how, o, k, {name: buffers[name] for name in quantized_call.part_names(call)})
        _emit(call, target, buffers, units, k, symbols.dim(call.args[0].shape[0]), config)
    return done()


def _emit(
    call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], units: Units, k: int, n: Expr, config: dict[str, Any]
) -> None:
    count, groups, results = int(config["rows"]), int(config["groups"]), int(call.result.shape[1])
    sides = 1 + linear_call.activation(call)[1]
    threads, chunks = groups * LANES, units.at.chunks
    x = Floats(target, buffers["x"], k, padded=k % units.at.chunk != 0)
    with launch(-(-results // ROWS), threads, ceildiv(n, count)) as (thread, tile, row_block):
        team = Team(target, thread, threads, MEMBERS)
        group, lane = bind(tirx.floordiv(thread, LANES)), bind(tirx.floormod(thread, LANES))
        rows = [bind(tirx.min(row_block * count + r, n - 1)) for r in range(count)]
        # Of each row of x and each side the sums of weight rows g and g + 8.
        sums = registers(count * sides * 2, start=0.0)
        tiles = [bind(tile + side * (results // ROWS)) for side in range(sides)]

        def chunk(index: Expr) -> None:
            for first_unit, words in units.lane_units(tiles, index, lane):
                column = bind(first_unit * UNIT)
                values = [[bind(v) for v in x.values(row, column)] for row in rows]
                plain = [bind(sum(v[1:], v[0])) for v in values] if units.shifted else []
                for side in range(sides):
                    for half in range(2):
                        codes, scale, shift = words[side][half]
                        for r in range(count):
                            dot = codes[0] * values[r][0]
                            for code, value in zip(codes[1:], values[r][1:], strict=True):
                                dot = bind(dot + code * value)
                            at = (r * sides + side) * 2 + half
                            scaled = dot if scale is None else dot * scale
                            store(sums, sums[at] + (scaled if shift is None else scaled + plain[r] * shift), at)

        with T.serial(0, -(-chunks // groups)) as step:
            index = bind(i64(step) * groups + i64(group))
            if chunks % groups:
                when(index < chunks, lambda: chunk(index))
            else:
                chunk(index)
        partial = shared(groups * ROWS * count * sides)
        place = bind((group * ROWS + tirx.floordiv(lane, MEMBERS)) * (count * sides))
        for i in range(count * sides):
            for half in range(2):
                total = team.sum(sums[2 * i + half], MEMBERS)
                when(
                    tirx.floormod(lane, MEMBERS).equal(0),
                    lambda total=total, at=half * 8 * count * sides + i: store(partial, total, place + at),  # type: ignore[misc]
                )
        sync()

        def finish(item: Expr, _: int) -> None:
            inside, r = bind(tirx.floormod(item, ROWS)), bind(tirx.floordiv(item, ROWS))
            output, row = bind(tile * ROWS + inside), bind(row_block * count + r)
            totals = []
            for side in range(sides):
                at = bind(inside * (count * sides) + r * sides + side)
                total = read(partial, at)
                for other in range(1, groups):
                    total = total + read(partial, at + other * ROWS * count * sides)
                totals.append(bind(total * units.row_scale(bind(tirx.min(output, results - 1) + side * results))))
            when(
                tirx.all(output < results, row < n),
                lambda: linear_call.finish(call, buffers, totals[:1], row, output, totals[1:]),
            )

        each(thread, threads, ROWS * count, finish)


reference, roofline = quantized_call.reference, quantized_call.roofline
