"""``llmc.linear`` on a CPU: act(x · weightᵀ + bias) + residual, weights in place as stored, float32 accumulation.

The work is cut into (row block × output block) tasks. Inside a task the few weight rows of an output block stay in the
first-level cache (a long k in blocks) while all rows of the block pass over them, so a step with n ≤ ``row_block`` rows reads
every weight once (decode: the machine's memory bandwidth), and with many rows the multiply-add units are the limit.
The first row of a block streams the weights in the order they lie in memory (with k of a few hundred, several short rows at
once defeat the hardware's prefetch); the others find them in the cache and go through the register tile ``rows × outputs`` of
``tile``, rows left over one at a time.

In the extend phase the others read a copy of the weights, if they are narrow or k is long: float32, side by side; with a long k
a copy of x too, both in blocks. Rows whose length is a power of two would lie in the same few cache sets and in a page each,
and narrow weights would be widened for every few rows. The sums are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.dot import TileShape, dot_block, dot_tile, output_blocks, tile_shapes
from llmc.schedules.cpu.emit import (
    PARALLEL_WORK,
    Simd,
    Symbols,
    arguments,
    ceildiv,
    each_vector,
    function,
    i64,
    local,
    read,
    store,
    when,
)
from llmc.schedules.cpu.math import ACTIVATIONS, Math
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.linear"
OP = "llmc.linear"
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
K_BLOCKS = (3072, 1536, 6144, 16384)
"""Bytes of a weight row. A longer one is cut into blocks of this size, of which a tile's rows fit the first-level cache."""


def _call(o: int, k: int, dtype: str = "float32", phase: str = "extend", **attrs: Any) -> KernelCall:
    args = [TensorSpec(("n", k), "float32"), TensorSpec((o, k), dtype)]
    if attrs.get("bias"):
        args.append(TensorSpec((o,), "float32"))
    if attrs.get("residual"):
        args.append(TensorSpec(("n", o), "float32"))
    full = {"activation": "none", "bias": 0, "residual": 0, **attrs}
    return KernelCall(OP, tuple(args), TensorSpec(("n", o), "float32"), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "square_576": _call(576, 576),
    "qkv_960x576": _call(960, 576, phase="decode"),
    "down_576x1536_residual": _call(576, 1536, residual=1),
    "long_k_11x2077": _call(11, 2077, "bfloat16"),
    "odd_19x57_bias": _call(19, 57, bias=1),
    "odd_37x100_f16_silu": _call(37, 100, "float16", activation="silu", bias=1, residual=1),
    "odd_19x57_bf16_gelu": _call(19, 57, "bfloat16", activation="gelu", bias=1),
    "long_k_21x3200_bf16_bias": _call(21, 3200, "bfloat16", bias=1),
    "power_of_two_9x2048_f16": _call(9, 2048, "float16", activation="silu"),
    "power_of_two_decode_5x2048": _call(5, 2048, phase="decode"),
    "one_output": _call(1, 33, activation="relu"),
    "tiny_k": _call(8, 3, "bfloat16", activation="relu2", residual=1),
    "gelu_tanh_64x48": _call(64, 48, "float16", activation="gelu_tanh", phase="decode"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or len(call.args[0].shape) != 2 or call.attr("activation") not in ACTIVATIONS:
        return None
    others = [a.dtype for i, a in enumerate(call.args) if i != 1]
    o, k = call.args[1].shape
    if call.args[1].dtype not in WIDTH or not isinstance(o, int) or not isinstance(k, int):
        return None
    if others[0] != "float32" or any(d not in WIDTH for d in others):
        return None
    return f"{call.args[1].dtype} weights in place, {target.vector_bits}-bit vectors along k"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``row_block``: rows that share one pass over the weights, about. ``tile``: rows and outputs in registers at once.

    ``k_block``: bytes of a weight row that stay in the first-level cache, for rows that are longer.
    """
    simd, narrow = Simd(target), WIDTH[call.args[1].dtype] < 4
    tiles = [[t.rows, t.outputs] for t in tile_shapes(simd)]
    if narrow and simd.registers >= 32:
        # A weight is widened once for all rows of a tile: few outputs of many rows.
        tiles.sort(key=lambda t: t != [6, 4])
    row_bytes = int(call.args[1].shape[1]) * WIDTH[call.args[1].dtype]
    blocks = [b for i, b in enumerate(K_BLOCKS) if i == 0 or min(b, K_BLOCKS[0]) < row_bytes]
    return {"row_block": [96, 48, 192, 24], "tile": tiles, "k_block": blocks}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    tile = TileShape(*config["tile"])
    o, k = (int(d) for d in call.args[1].shape)
    # The first row of a block streams the weights, the others come in whole tiles.
    block, k_block = int(config["row_block"]) // tile.rows * tile.rows + 1, int(config["k_block"]) // WIDTH[call.args[1].dtype]
    specs = dict(zip(_names(call), (*call.args, call.result), strict=True))
    with function(f"linear_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        pack_block, narrow = int(config["k_block"]) // WIDTH["float32"], call.args[1].dtype != "float32"
        packs = call.phase != "decode" and k % simd.lanes == 0 and (narrow or k > pack_block)
        x_blocks = _blocks(simd, buffers["x"], n, k, pack_block) if packs and k > pack_block else None
        full, rest = o // tile.outputs, output_blocks(o, tile.outputs)
        tasks = full + (1 if rest else 0)

        def rows(start: Expr, count: int, first: Expr, outputs: int, stream: bool = False) -> None:
            x_rows = [(start + i,) for i in range(count)]
            w_rows = [(first + j,) for j in range(outputs)]
            sums = dot_tile(simd, buffers["x"], x_rows, buffers["weight"], w_rows, k, stream)
            for i, value in enumerate(sums):
                _finish(call, simd, buffers, value, start + i, first, outputs)

        def columns(low: Expr, high: Expr, first: Expr, outputs: int) -> None:
            rows(low, 1, first, outputs, stream=True)
            if packs:
                when(low + 1 < high, lambda: packed(low + 1, high, first, outputs))
                return
            if k > k_block:
                blocked(low + 1, high, first, outputs)
                return
            each_tile(low + 1, high, lambda row, count: rows(row, count, first, outputs))

        def each_tile(low: Expr, high: Expr, body: Callable[[Expr, int], None]) -> None:
            tiles = T.bind(tirx.floordiv(high - low, tile.rows))
            with T.serial(0, tiles) as t:
                body(low + i64(t) * tile.rows, tile.rows)
            with T.serial(low + tiles * tile.rows, high) as row:
                body(i64(row), 1)

        def blocked(low: Expr, high: Expr, first: Expr, outputs: int) -> None:
            """All rows over one block of k after the other, so that the weights of a block stay in the first-level cache."""
            w_rows = [(first + j,) for j in range(outputs)]
            scratch = local(simd.lanes, (block - 1) * outputs)

            def over(start: Expr, count: int, last: bool) -> None:
                def tile_rows(row: Expr, size: int) -> None:
                    x_rows, slots = [(row + i,) for i in range(size)], [(row - low + i) * outputs for i in range(size)]
                    dot_block(simd, buffers["x"], x_rows, buffers["weight"], w_rows, k, scratch, slots, start, count, last)

                each_tile(low, high, tile_rows)

            def sums() -> None:
                whole = k // k_block - (0 if k % k_block else 1)
                with T.serial(0, whole) as b:
                    over(i64(b) * k_block, k_block, False)
                over(i64(whole * k_block), k - whole * k_block, True)

            clear_and_finish(scratch, low, high, first, outputs, sums)

        def packed(low: Expr, high: Expr, first: Expr, outputs: int) -> None:
            """All rows over the weights' copy, which holds one block of k after the other."""
            weights = T.alloc_buffer((outputs, min(k, pack_block)), "float32")
            w_rows = [(i64(j),) for j in range(outputs)]

            def pack(start: Expr, count: int) -> None:
                for j in range(outputs):

                    def copy(at: Expr, lanes: int, j: int = j) -> None:
                        value = simd.load(buffers["weight"], first + j, start + at, lanes=lanes)
                        store(weights, value, i64(j), at, lanes=lanes)

                    each_vector(count, simd.lanes, copy)

            if x_blocks is None:
                pack(i64(0), k)

                def tile_rows(row: Expr, size: int) -> None:
                    sums = dot_tile(simd, buffers["x"], [(row + i,) for i in range(size)], weights, w_rows, k)
                    for i, value in enumerate(sums):
                        _finish(call, simd, buffers, value, row + i, first, outputs)

                each_tile(low, high, tile_rows)
                return
            scratch = local(simd.lanes, (block - 1) * outputs)

            def over(b: Expr, count: int) -> None:
                pack(b * pack_block, count)

                def tile_rows(row: Expr, size: int) -> None:
                    x_rows, slots = [(b, row + i) for i in range(size)], [(row - low + i) * outputs for i in range(size)]
                    dot_block(simd, x_blocks, x_rows, weights, w_rows, k, scratch, slots, i64(0), count, False)

                each_tile(low, high, tile_rows)

            clear_and_finish(scratch, low, high, first, outputs, lambda: each_block(over))

        def each_block(over: Callable[[Expr, int], None]) -> None:
            with T.serial(0, k // pack_block) as b:
                over(i64(b), pack_block)
            if k % pack_block:
                over(i64(k // pack_block), k % pack_block)

        def clear_and_finish(scratch: Expr, low: Expr, high: Expr, first: Expr, outputs: int, sums: Callable[[], None]) -> None:
            """``sums`` adds to the accumulators of the rows in ``scratch``."""
            with T.serial(0, (high - low) * outputs) as i:
                store(scratch, simd.splat(0.0, simd.lanes), i64(i) * simd.lanes, lanes=simd.lanes)
            sums()
            with T.serial(low, high) as r:
                row = T.bind(i64(r))
                vectors = [read(scratch, ((row - low) * outputs + j) * simd.lanes, lanes=simd.lanes) for j in range(outputs)]
                _finish(call, simd, buffers, simd.sums(vectors), row, first, outputs)

        def task(t: Expr) -> None:
            low = T.bind(tirx.floordiv(t, tasks) * block)
            high = T.bind(tirx.min(low + block, n))
            b = T.bind(tirx.floormod(t, tasks))

            def whole() -> None:
                columns(low, high, b * tile.outputs, tile.outputs)

            def remainder() -> None:
                for start, outputs in rest:
                    columns(low, high, i64(start), outputs)

            if not rest:
                whole()
            elif full == 0:
                remainder()
            else:
                when(b < full, whole, remainder)

        extent = ceildiv(n, block) * tasks
        # A matrix this small is done before another thread has woken up, except for many rows.
        small = o * k < PARALLEL_WORK and call.phase == "decode"
        with T.serial(0, extent) if small else T.parallel(0, extent) as t:
            task(t)
    return done()


def _blocks(simd: Simd, x: Expr, n: Expr, k: int, block: int) -> Expr:
    """A copy of ``x`` [n, k] as [blocks of k, n, block], made on all threads. The rest of a last block that is short is not set."""
    copy = T.alloc_buffer((-(-k // block), n, block), "float32")
    with T.parallel(0, n) as r:
        row = i64(r)
        for low in range(0, k, block):

            def move(at: Expr, lanes: int, low: int = low) -> None:
                store(copy, read(x, row, at + low, lanes=lanes), i64(low // block), row, at, lanes=lanes)

            each_vector(min(block, k - low), simd.lanes, move)
    return copy


def _names(call: KernelCall) -> list[str]:
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", "weight", *optional, "out"]


def _finish(call: KernelCall, simd: Simd, buffers: dict[str, Expr], value: Expr, row: Expr, first: Expr, lanes: int) -> None:
    """Bias, activation, residual and the store of ``lanes`` outputs of one row."""
    if call.attr("bias"):
        value = value + simd.load(buffers["bias"], first, lanes=lanes)
    value = Math(simd, lanes).activate(call.attr("activation"), value)
    if call.attr("residual"):
        value = value + simd.load(buffers["residual"], row, first, lanes=lanes)
    store(buffers["out"], simd.narrow(value, call.result.dtype, lanes), row, first, lanes=lanes)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.linear import reference as linear_reference

    named = dict(zip(_names(call), arrays, strict=False))
    return linear_reference(**named, activation=call.attr("activation"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    moved = sum(int(np.prod(s.bind(symbols))) * WIDTH[s.dtype] for s in (*call.args, call.result))
    n, k = call.args[0].bind(symbols)
    return moved, 2 * n * k * int(call.args[1].shape[0])
