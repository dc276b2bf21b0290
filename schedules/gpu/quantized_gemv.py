"""``llmc.quantized_linear`` in the decode phase on any GPU: each code is read once, in 16-byte loads, for a few rows.

A block of threads computes the 16 results of a tile (:mod:`.quantized_tile`), or of two where a gate is applied. The order of
additions depends on k alone, so a row has the same bits in every batch.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from llmc.schedules.gpu import linear_call, quantized_call
from llmc.schedules.gpu.emit import (
    Symbols,
    arguments,
    bind,
    ceildiv,
    each,
    function,
    launch,
    when,
)
from llmc.schedules.gpu.layout_mma import LANES, ROWS
from llmc.schedules.gpu.operand import Floats
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.gpu.quantized_tile import TileProducts, groups_that_fit, padded
from llmc.schedules.gpu.quantized_units import Units
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.quantized_gemv"
OP = quantized_call.OP

SHAPES: dict[str, KernelCall] = {
    "square_4096_int4_g128": make(4096, 4096, "int4_g128"),
    "even_64x512_int4_g64": make(64, 512, "int4_g64"),
    "odd_19x57_q4_1_f16": make(19, 57, "q4_1", "float16", bias=1, residual=1, activation="silu"),
    "wide_9x600_zero_point_f32": make(9, 600, "int4p_g128", "float32", activation="gelu"),
    "one_int8": make(1, 3, "int8"),
    "half_block_24x64_int8": make(24, 64, "int8", out="float32"),
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
    return {"rows": [4, 1, 2], "groups": groups_that_fit(target)}


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
    sides, threads = 1 + linear_call.activation(call)[1], groups * LANES
    x = Floats(target, buffers["x"], k, padded=padded(units, k))
    with launch(-(-results // ROWS), threads, ceildiv(n, count)) as (thread, tile, row_block):
        products = TileProducts(target, thread, groups, count, sides)
        rows = [bind(tirx.min(row_block * count + r, n - 1)) for r in range(count)]
        products.compute(units, [bind(tile + side * (results // ROWS)) for side in range(sides)], x, rows)

        def finish(item: Expr, _: int) -> None:
            inside, r = bind(tirx.floormod(item, ROWS)), bind(tirx.floordiv(item, ROWS))
            output, row = bind(tile * ROWS + inside), bind(row_block * count + r)
            totals = []
            for side in range(sides):
                scale = units.row_scale(bind(tirx.min(output, results - 1) + side * results))
                totals.append(bind(products.total(inside, r, side) * scale))
            when(
                tirx.all(output < results, row < n),
                lambda: linear_call.finish(call, buffers, totals[:1], row, output, totals[1:]),
            )

        each(thread, threads, ROWS * count, finish)


reference, roofline = quantized_call.reference, quantized_call.roofline
