"""``llmc.linear`` on a CPU: act(x · weightᵀ + bias) + residual, weights in place as stored, float32 accumulation.

The work is cut into (row block × output block) tasks. Inside a task the few weight rows of an output block stay in the
first-level cache (a long k in blocks) while all rows of the block pass over them, so a step with n ≤ ``row_block`` rows reads
every weight once (decode: the machine's memory bandwidth), and with many rows the multiply-add units are the limit.
The first row of a block streams the weights in the order they lie in memory (with k of a few hundred, several short rows at
once defeat the hardware's prefetch); the others find them in the cache and go through the register tile ``rows × outputs`` of
``tile``, rows left over one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.dot import TileShape, dot_block, dot_tile, output_blocks, tile_shapes
from llmc.schedules.cpu.emit import PARALLEL_WORK, Simd, Symbols, arguments, ceildiv, function, i64, local, read, store, when
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

            with T.serial(0, (high - low) * outputs) as i:
                store(scratch, simd.splat(0.0, simd.lanes), i64(i) * simd.lanes, lanes=simd.lanes)
            whole = k // k_block - (0 if k % k_block else 1)
            with T.serial(0, whole) as b:
                over(i64(b) * k_block, k_block, False)
            over(i64(whole * k_block), k - whole * k_block, True)
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
