"""``llmc.linear`` on any GPU from sm_80 on, every shape and dtype: float32 multiply-adds on the ordinary cores.

It takes what the tensor core families do not: float32 matrices, rows that are no multiple of 16 bytes, older GPUs. In the
decode phase a warp computes one output of ``DECODE_ROWS`` rows, its lanes split k; in the extend phase a block computes a tile of
``TILE`` x ``TILE`` results through shared memory. The order of additions does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cuda import linear_call
from llmc.schedules.cuda.emit import (
    STORAGE,
    WARP,
    Symbols,
    arguments,
    bind,
    ceildiv,
    common_lanes,
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
)  # fmt: skip
from llmc.schedules.cuda.math import ACTIVATIONS, activate
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.linear_simple"
OP = "llmc.linear"
DECODE_WARPS = 4
DECODE_ROWS = 4
TILE, TILE_K = 64, 16
THREADS = 256
PITCH = TILE + 4
"""Row pitch of a tile in shared memory: rows start 16 bytes apart in the banks, and stay aligned to 16 bytes."""


def _call(
    o: int, k: int, dtype: str = "float32", weight: str = "", phase: str = "extend", out: str = "", **attrs: Any
) -> KernelCall:
    args = [TensorSpec(("n", k), dtype), TensorSpec((o, k), weight or dtype)]
    if attrs.get("bias"):
        args.append(TensorSpec((o,), weight or dtype))
    if attrs.get("residual"):
        args.append(TensorSpec(("n", o), dtype))
    full = {"activation": "none", "bias": 0, "residual": 0, **attrs}
    return KernelCall(OP, tuple(args), TensorSpec(("n", o), out or dtype), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "square_4096": _call(4096, 4096, "bfloat16"),
    "decode_64x256": _call(64, 256, "bfloat16", phase="decode"),
    "decode_19x57": _call(19, 57, "float16", phase="decode", bias=1, residual=1, activation="silu"),
    "decode_9x600_mixed": _call(9, 600, "float32", "bfloat16", phase="decode", activation="gelu"),
    "decode_one": _call(1, 3, phase="decode"),
    "extend_72x40": _call(72, 40),
    "extend_130x37": _call(130, 37, "bfloat16", bias=1, residual=1, activation="gelu_tanh"),
    "extend_5x16_mixed": _call(5, 16, "float16", "float32", activation="relu", out="float32"),
    "extend_66x1": _call(66, 1, activation="relu2", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cuda" or call.attr("activation") not in ACTIVATIONS:
        return None
    weight = call.args[1]
    if len(call.args[0].shape) != 2 or not all(isinstance(d, int) for d in weight.shape):
        return None
    if any(s.dtype not in STORAGE for s in (*call.args, call.result)):
        return None
    return "float32 multiply-adds, " + ("a warp to an output" if call.phase == "decode" else f"{TILE}x{TILE} tiles")


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    o, k = (int(d) for d in call.args[1].shape)
    specs = dict(zip(linear_call.operand_names(call), (*call.args, call.result), strict=True))
    with function(f"linear_simple_{call.phase}_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        (_decode if call.phase == "decode" else _extend)(call, buffers, n, o, k)
    return done()


def _decode(call: KernelCall, buffers: dict[str, Expr], n: Expr, o: int, k: int) -> None:
    lanes = common_lanes([s.dtype for s in call.args[:2]], k)
    pieces = k // lanes
    with launch(-(-o // DECODE_WARPS), DECODE_WARPS * WARP, ceildiv(n, DECODE_ROWS)) as (thread, block, row_block):
        lane = bind(tirx.floormod(thread, WARP))
        output = bind(block * DECODE_WARPS + i64(tirx.floordiv(thread, WARP)))
        # A warp without an output, and rows that do not exist, work on the last one: all threads take part in the sums.
        line = bind(tirx.min(output, o - 1))
        rows = [bind(tirx.min(row_block * DECODE_ROWS + r, n - 1)) for r in range(DECODE_ROWS)]
        sums = registers(DECODE_ROWS)
        for r in range(DECODE_ROWS):
            store(sums, f32(0.0), r)

        def piece(index: Expr) -> None:
            weights = [bind(w) for w in load(buffers["weight"], line, index * lanes, lanes=lanes)]
            for r, row in enumerate(rows):
                for w, x in zip(weights, load(buffers["x"], row, index * lanes, lanes=lanes), strict=True):
                    store(sums, sums[r] + w * x, r)

        with T.serial(0, pieces // WARP) as step:
            piece(bind(i64(step) * WARP + i64(lane)))
        if pieces % WARP:
            each(lane, WARP, pieces % WARP, lambda item, _: piece(bind(item + pieces // WARP * WARP)))
        for r, row in enumerate(rows):
            total = warp_sum(sums[r])

            def finish(row: Expr = row, total: Expr = total) -> None:
                _finish(call, buffers, total, row, output)

            when(tirx.all(lane.equal(0), output < o, row_block * DECODE_ROWS + r < n), finish)


def _extend(call: KernelCall, buffers: dict[str, Expr], n: Expr, o: int, k: int) -> None:
    side, per_thread = TILE // 4, TILE * TILE_K // THREADS
    with launch(-(-o // TILE), THREADS, ceildiv(n, TILE)) as (thread, column_block, row_block):
        x_tile, w_tile, sums = shared(TILE_K * PITCH), shared(TILE_K * PITCH), registers(16)
        first_row, first_output = bind(row_block * TILE), bind(column_block * TILE)
        across, down = bind(tirx.floormod(thread, side)), bind(tirx.floordiv(thread, side))
        line, start = (
            bind(tirx.floordiv(thread, TILE_K // per_thread)),
            bind(tirx.floormod(thread, TILE_K // per_thread) * per_thread),
        )
        for i in range(16):
            store(sums, f32(0.0), i)

        def fetch(tile: Expr, source: Expr, row: Expr, rows: Expr, step: Expr) -> None:
            """``per_thread`` elements of one row, transposed into the tile; zero beyond the edges."""
            for i in range(per_thread):
                column = bind(i64(step) * TILE_K + i64(start) + i)
                inside = tirx.all(row < rows, column < k)
                value = load(source, bind(tirx.min(row, rows - 1)), bind(tirx.min(column, k - 1)))[0]
                store(tile, tirx.Select(inside, value, f32(0.0)), (start + i) * PITCH + line)

        with T.serial(0, -(-k // TILE_K)) as step:
            fetch(x_tile, buffers["x"], bind(first_row + i64(line)), n, step)
            fetch(w_tile, buffers["weight"], bind(first_output + i64(line)), i64(o), step)
            T.evaluate(T.tvm_storage_sync("shared"))
            with T.serial(0, TILE_K) as kk:
                xs = [bind(read(x_tile, kk * PITCH + down * 4 + i)) for i in range(4)]
                ws = [bind(read(w_tile, kk * PITCH + across * 4 + i)) for i in range(4)]
                for i, x in enumerate(xs):
                    for j, w in enumerate(ws):
                        store(sums, sums[i * 4 + j] + x * w, i * 4 + j)
            T.evaluate(T.tvm_storage_sync("shared"))
        for i in range(4):
            for j in range(4):
                row, output = bind(first_row + i64(down) * 4 + i), bind(first_output + i64(across) * 4 + j)

                def finish(row: Expr = row, output: Expr = output, total: Expr = sums[i * 4 + j]) -> None:
                    _finish(call, buffers, total, row, output)

                when(tirx.all(row < n, output < o), finish)


def _finish(call: KernelCall, buffers: dict[str, Expr], total: Expr, row: Expr, output: Expr) -> None:
    """Bias, activation, residual and the store of one result."""
    if call.attr("bias"):
        total = total + load(buffers["bias"], output)[0]
    value = activate(call.attr("activation"), bind(total))
    if call.attr("residual"):
        value = value + load(buffers["residual"], row, output)[0]
    store_all(buffers["out"], [value], row, output)


reference, roofline = linear_call.reference, linear_call.roofline
