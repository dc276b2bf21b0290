"""``llmc.quantized_linear`` on any GPU from sm_80 on, every shape and dtype: float32 multiply-adds on the ordinary cores.

It takes what the tensor core families do not: float32 activations, rows that are no multiple of 16 bytes, prefill on older GPUs.
Weights are dequantized in float32, eight columns at a time. In the decode phase a warp computes one output of ``DECODE_ROWS`` rows,
its lanes split k; in the extend phase a block computes a tile of ``TILE`` x ``TILE`` results through shared memory. The order of
additions does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cuda import linear_call, quantized_call
from llmc.schedules.cuda.emit import (
    STORAGE,
    WARP,
    Symbols,
    arguments,
    bind,
    ceildiv,
    each,
    f32,
    function,
    i64,
    launch,
    load,
    read,
    registers,
    shared,
    store,
    store_all,
    warp_sum,
    when,
)
from llmc.schedules.cuda.layout_mma import UNIT
from llmc.schedules.cuda.math import ACTIVATIONS, activate
from llmc.schedules.cuda.quantized_call import make
from llmc.schedules.cuda.quantized_units import Units, padded
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.quantized_simple"
OP = quantized_call.OP
DECODE_WARPS = 4
DECODE_ROWS = 4
TILE, TILE_K = 64, 32
THREADS = TILE * TILE_K // UNIT
"""One to eight columns of a row."""

PITCH = TILE + 4
"""Row pitch of a tile in shared memory: rows start 16 bytes apart in the banks, and stay aligned to 16 bytes."""

SHAPES: dict[str, KernelCall] = {
    "square_4096_int4_g128": make(4096, 4096, "int4_g128", phase="extend"),
    "decode_64x256_int4_g64": make(64, 256, "int4_g64"),
    "decode_19x57_q4_1_f16": make(19, 57, "q4_1", "float16", bias=1, residual=1, activation="silu"),
    "decode_9x600_zero_point_f32": make(9, 600, "int4p_g128", "float32", activation="gelu"),
    "decode_one_int8": make(1, 3, "int8"),
    "extend_72x40_fp8": make(72, 40, "fp8_e4m3", phase="extend"),
    "extend_130x100_q8_0_f16": make(130, 100, "q8_0", "float16", "extend", bias=1, residual=1, activation="gelu_tanh"),
    "extend_5x16_fp8_blocks_f32": make(5, 16, "fp8_e4m3_b128", "float32", "extend", activation="relu"),
    "decode_gated_38x64_int4": make(38, 64, "int4", activation="silu_gated", bias=1),
    "extend_gated_70x96_int8": make(70, 96, "int8", phase="extend", activation="gelu_gated", residual=1),
    "extend_66x1_int3": make(66, 1, "int3_g32", "bfloat16", "extend", activation="relu2", bias=1, out="float32"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if not quantized_call.is_ours(call, target) or linear_call.activation(call)[0] not in ACTIVATIONS:
        return None
    parts = quantized_call.part_names(call)
    if any(s.dtype not in STORAGE for name, s in quantized_call.specs(call).items() if name not in parts):
        return None
    return "float32 multiply-adds of dequantized weights, " + (
        "a warp to an output" if call.phase == "decode" else f"{TILE}x{TILE} tiles"
    )


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols, how = Symbols(), quantized_call.how(call)
    o, k = int(call.attr("o")), int(call.attr("k"))
    specs = quantized_call.specs(call)
    with function(f"quantized_simple_{call.phase}_{how.name}_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        units = Units(how, o, k, {name: buffers[name] for name in quantized_call.part_names(call)})
        (_decode if call.phase == "decode" else _extend)(call, buffers, units, n, o, k)
    return done()


def _x(buffers: dict[str, Expr], row: Expr, unit: Expr, k: int) -> list[Expr]:
    """Eight columns of x, zero beyond its last."""
    if k % UNIT == 0:
        return load(buffers["x"], row, unit * UNIT, lanes=UNIT if str(buffers["x"].ty.dtype) != "float32" else 4) + (
            load(buffers["x"], row, unit * UNIT + 4, lanes=4) if str(buffers["x"].ty.dtype) == "float32" else []
        )
    columns = [bind(unit * UNIT + e) for e in range(UNIT)]
    return [tirx.Select(c < k, load(buffers["x"], row, bind(tirx.min(c, k - 1)))[0], f32(0.0)) for c in columns]


def _decode(call: KernelCall, buffers: dict[str, Expr], units: Units, n: Expr, o: int, k: int) -> None:
    count, sides = -(-k // UNIT), 1 + linear_call.activation(call)[1]
    results = o // sides
    with launch(-(-results // DECODE_WARPS), DECODE_WARPS * WARP, ceildiv(n, DECODE_ROWS)) as (thread, block, row_block):
        lane = bind(tirx.floormod(thread, WARP))
        output = bind(block * DECODE_WARPS + i64(tirx.floordiv(thread, WARP)))
        # A warp without an output, and rows that do not exist, work on the last one: all threads take part in the sums.
        line = padded(output, results - 1)
        rows = [bind(tirx.min(row_block * DECODE_ROWS + r, n - 1)) for r in range(DECODE_ROWS)]
        sums = registers(DECODE_ROWS * sides)
        for i in range(DECODE_ROWS * sides):
            store(sums, f32(0.0), i)

        def piece(unit: Expr) -> None:
            weights = [[bind(w) for w in units.load(bind(line + side * results), unit)] for side in range(sides)]
            for r, row in enumerate(rows):
                for e, x in enumerate(_x(buffers, row, unit, k)):
                    for side in range(sides):
                        i = r * sides + side
                        store(sums, sums[i] + weights[side][e] * x, i)

        with T.serial(0, count // WARP) as step:
            piece(bind(i64(step) * WARP + i64(lane)))
        if count % WARP:
            each(lane, WARP, count % WARP, lambda item, _: piece(bind(item + count // WARP * WARP)))
        for r, row in enumerate(rows):
            totals = [warp_sum(sums[r * sides + side]) for side in range(sides)]

            def finish(row: Expr = row, totals: list[Expr] = totals) -> None:
                _finish(call, buffers, totals, row, output)

            when(tirx.all(lane.equal(0), output < results, row_block * DECODE_ROWS + r < n), finish)


def _extend(call: KernelCall, buffers: dict[str, Expr], units: Units, n: Expr, o: int, k: int) -> None:
    side_length, in_row, sides = TILE // 4, TILE_K // UNIT, 1 + linear_call.activation(call)[1]
    results, last_unit = o // sides, units.at.columns // UNIT - 1
    with launch(-(-results // TILE), THREADS, ceildiv(n, TILE)) as (thread, column_block, row_block):
        x_tile, w_tiles = shared(TILE_K * PITCH), [shared(TILE_K * PITCH) for _ in range(sides)]
        sums = registers(16 * sides)
        first_row, first_output = bind(row_block * TILE), bind(column_block * TILE)
        across, down = bind(tirx.floormod(thread, side_length)), bind(tirx.floordiv(thread, side_length))
        line, part = bind(tirx.floordiv(thread, in_row)), bind(tirx.floormod(thread, in_row))
        # Rows and outputs beyond the last are not stored; columns beyond k meet zeros in x.
        x_row = bind(tirx.min(first_row + i64(line), n - 1))
        w_row = padded(first_output + i64(line), results - 1)
        for i in range(16 * sides):
            store(sums, f32(0.0), i)

        with T.serial(0, -(-k // TILE_K)) as step:
            unit = bind(i64(step) * in_row + i64(part))
            inside = unit * UNIT < k
            near = bind(tirx.min(unit, -(-k // UNIT) - 1))
            for e, x in enumerate(_x(buffers, x_row, near, k)):
                store(x_tile, tirx.Select(inside, x, f32(0.0)), (part * UNIT + e) * PITCH + line)
            for side, w_tile in enumerate(w_tiles):
                for e, w in enumerate(units.load(bind(w_row + side * results), bind(tirx.min(unit, last_unit)))):
                    store(w_tile, w, (part * UNIT + e) * PITCH + line)
            T.evaluate(T.tvm_storage_sync("shared"))
            with T.serial(0, TILE_K) as kk:
                xs = [bind(read(x_tile, kk * PITCH + down * 4 + i)) for i in range(4)]
                for side, w_tile in enumerate(w_tiles):
                    ws = [bind(read(w_tile, kk * PITCH + across * 4 + i)) for i in range(4)]
                    for i, x in enumerate(xs):
                        for j, w in enumerate(ws):
                            at = (i * 4 + j) * sides + side
                            store(sums, sums[at] + x * w, at)
            T.evaluate(T.tvm_storage_sync("shared"))
        for i in range(4):
            for j in range(4):
                row, output = bind(first_row + i64(down) * 4 + i), bind(first_output + i64(across) * 4 + j)

                def finish(row: Expr = row, output: Expr = output, at: int = (i * 4 + j) * sides) -> None:
                    _finish(call, buffers, [sums[at + side] for side in range(sides)], row, output)

                when(tirx.all(row < n, output < results), finish)


def _finish(call: KernelCall, buffers: dict[str, Expr], totals: list[Expr], row: Expr, output: Expr) -> None:
    """Bias, activation, the gate's factor, residual and the store of one result."""
    if call.attr("bias"):
        results = int(call.attr("o")) // len(totals)
        totals = [total + load(buffers["bias"], bind(output + side * results))[0] for side, total in enumerate(totals)]
    value = activate(linear_call.activation(call)[0], bind(totals[0]))
    for factor in totals[1:]:
        value = value * factor
    if call.attr("residual"):
        value = value + load(buffers["residual"], row, output)[0]
    store_all(buffers["out"], [value], row, output)


reference, roofline = quantized_call.reference, quantized_call.roofline
