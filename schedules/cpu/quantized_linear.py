"""``llmc.quantized_linear`` on a CPU: int8 activations times integer codes, for weights of :mod:`.layout_panel`.

x is rounded to int8 once per call, with a scale for every 32 columns (:mod:`.quantized_rows`); the products of a block of 32
columns are exact integers; block sums are scaled and added in float32, in the order of k. So a row's result depends neither on
the number of rows nor on the tile it falls into.

The work is cut into (row block × panel) tasks. With few rows a task streams its panel once from memory; with many rows a
block's codes are unpacked into registers once for a tile of rows, whose activations come as broadcasts from the first-level
cache: a row block fits it, and passes over as many panels as the second-level cache holds before the next one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import layout_panel, quantized_rows, tiles
from llmc.schedules.cpu.emit import (
    Simd,
    Symbols,
    arguments,
    bind,
    ceildiv,
    function,
    i64,
    keep,
)
from llmc.schedules.cpu.layout_panel import BLOCK, ROWS, Panels, geometry
from llmc.schedules.cpu.math import ACTIVATIONS
from llmc.schedules.cpu.quantized_dot import Dot
from llmc.schedules.cpu.quantized_products import Products
from llmc.schedules.cpu.quantized_tiles import TileProducts
from llmc.schedules.cpu.rows_kernel import RowsKernel
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.quantized_linear"
OP = "llmc.quantized_linear"
AHEAD = 4096
"""Bytes before they are needed that weights of few bits are asked for: the processor does not look beyond a page by itself."""
MANY_PANELS = 64
"""From so many panels on, a single row asks for weights further ahead."""
ROWS_CACHE = 28 << 10
"""Bytes of rounded activations that a row block of more than 24 rows has at most: most of a first-level cache."""
PANELS_CACHE = 384 << 10
"""Bytes of panels that one row block after the other passes over: part of a second-level cache."""


def _call(o: int, k: int, name: str, phase: str = "extend", **attrs: Any) -> KernelCall:
    args = [TensorSpec(("n", k), "float32"), *layout_panel.parts(scheme(name), o, k).values()]
    if attrs.get("bias"):
        args.append(TensorSpec((o,), "float32"))
    if attrs.get("residual"):
        args.append(TensorSpec(("n", o), "float32"))
    full = {"activation": "none", "bias": 0, "residual": 0, "scheme": name, "layout": layout_panel.NAME, "o": o, "k": k, **attrs}
    return KernelCall(OP, tuple(args), TensorSpec(("n", o), "float32"), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "qkv_960x576_q4_1": _call(960, 576, "q4_1", phase="decode"),
    "down_576x1536_q4_0_residual": _call(576, 1536, "q4_0", residual=1),
    "square_256_int4_g64": _call(256, 256, "int4_g64"),
    "square_256_int4_g128_bias": _call(256, 256, "int4_g128", bias=1),
    "odd_19x100_int4z_g32_silu": _call(19, 100, "int4z_g32", activation="silu", bias=1, residual=1),
    "odd_37x200_int4_g128": _call(37, 200, "int4_g128"),
    "odd_33x70_int8": _call(33, 70, "int8", phase="decode"),
    "int8_g32_64x96": _call(64, 96, "int8_g32", activation="gelu"),
    "q8_0_48x64": _call(48, 64, "q8_0", activation="relu"),
    "q5_0_40x96": _call(40, 96, "q5_0", activation="gelu_tanh"),
    "q5_1_16x64": _call(16, 64, "q5_1", residual=1),
    "zero_points_24x128_int4p_g64": _call(24, 128, "int4p_g64"),
    "zero_points_24x128_int8p_g32": _call(24, 128, "int8p_g32"),
    "six_bits_16x80_int6_g16_f32": _call(16, 80, "int6_g16_f32", bias=1),
    "three_bits_17x64_int3z_g32_bf16": _call(17, 64, "int3z_g32_bf16"),
    "q2_k_17x256": _call(17, 256, "q2_k", bias=1),
    "q3_k_35x512": _call(35, 512, "q3_k", phase="decode"),
    "q4_k_40x512": _call(40, 512, "q4_k", residual=1),
    "q5_k_19x256": _call(19, 256, "q5_k"),
    "q6_k_33x512": _call(33, 512, "q6_k", phase="decode"),
    "one_output_q4_0": _call(1, 32, "q4_0", activation="relu2"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.attr("layout") != layout_panel.NAME:
        return None
    if any(a.dtype != "float32" for i, a in enumerate((*call.args, call.result)) if i != 1):
        return None
    if call.attr("activation") not in ACTIVATIONS or call.attr("activations", "int8") != "int8" or len(call.args[0].shape) != 2:
        return None
    dot = Dot(Simd(target), target, scheme(call.attr("scheme")).bits)
    how = f"{'AMX tiles, ' if _has_tiles(call, target) else ''}{dot.how} on {target.vector_bits}-bit vectors"
    return f"int8 activations, {call.attr('scheme')} panels of {ROWS} rows, {how}"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``rows``: rows of a register tile; ``turn``: quads of codes after which another one of them goes on.

    Of prompts: ``row_block``: rows that pass over a panel while it is in the first-level cache, ``panels``: how many of these stay
    in the second-level cache for the row blocks that follow. Of steps: ``ahead``: bytes before they are needed that a single row
    asks for weights (0: never), ``streams``: see :func:`_streams`.
    """
    at, step = _geometry(call), call.phase == "decode"
    first = 0 if at.bits == 8 else AHEAD if at.panels >= MANY_PANELS else AHEAD // 2
    ahead = [first, *(bytes_ for bytes_ in (0, 512, 1024, 2048, 4096, 8192) if bytes_ != first)]
    if _has_tiles(call, target):
        rows: dict[str, list[Any]] = {"rows": [12, 8, 4], "turn": _turns(target, at)[:1]}
        return {**rows, "row_block": [128, 64, 256, 512, 32], "panels": _groups(at), "ahead": [AHEAD], "streams": [1]}
    simd = Simd(target)
    heights = [12, 8, 16, 4, 6] if simd.registers >= 32 else [4, 2, 6, 3, 5]
    rows = {"rows": heights, "turn": _turns(target, at)}
    fits = min(max(24, ROWS_CACHE // at.columns) // heights[0] * heights[0], 480)
    if step:
        return {**rows, "row_block": [fits], "panels": [at.panels], "ahead": ahead, "streams": [2, 1, 4]}
    blocks = [fits, *(b for b in (24, 48, 96, 192, 480) if b != fits)]
    return {**rows, "row_block": blocks, "panels": _groups(at), "ahead": [first], "streams": [1]}


def _turns(target: Target, at: Panels) -> list[int]:
    """Quads of a turn, the fastest first: fewer where each block has a scale of its own and products are added up in 16 bits."""
    fastest = 2 if at.blocks == 1 and at.bits < 8 else 4
    return sorted(Dot(Simd(target), target, at.bits).turns, key=lambda turn: turn != fastest)


def _groups(at: Panels) -> list[int]:
    """How many panels may stay in a cache: divisors of all of them."""
    most = (PANELS_CACHE, PANELS_CACHE // 2, PANELS_CACHE // 4, 2 * PANELS_CACHE, 0)
    divisors = [g for g in range(1, at.panels + 1) if at.panels % g == 0]
    return list(dict.fromkeys(max(g for g in divisors if g == 1 or g * at.panel_bytes <= bytes_) for bytes_ in most))


def _streams(call: KernelCall, config: dict[str, Any]) -> int:
    """Panels, far from each other in memory, that a task reads side by side for a single row: one stream of addresses at a time
    leaves a core waiting at the end of every memory page."""
    wanted = int(config["streams"])
    return wanted if _geometry(call).panels % wanted == 0 else 1


def _geometry(call: KernelCall) -> Panels:
    return geometry(scheme(call.attr("scheme")), int(call.attr("o")), int(call.attr("k")))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols, at = Simd(target), Symbols(), _geometry(call)
    specs = dict(zip(_names(call), (*call.args, call.result), strict=True))
    block = int(config["row_block"])
    with function(f"quantized_linear_{at.o}x{at.k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        tile = _tile(call, target, simd, buffers, n, int(config["ahead"]), int(config["turn"]), _has_tiles(call, target))

        streams = _streams(call, config)
        tasks = at.panels // streams

        blocks = bind(ceildiv(n, block))
        group = min(int(config["panels"]), tasks)

        def task(t: Expr) -> None:
            # Kept, so that TVM's analyses of every address do not go into a division by a variable.
            turn = keep(tirx.floordiv(t, group))
            low = keep(tirx.floormod(turn, blocks) * block)
            high = bind(tirx.min(low + block, n))
            first = keep(tirx.floordiv(turn, blocks) * group + tirx.floormod(t, group))
            panels = [bind(first + s * tasks) for s in range(streams)]
            if _has_tiles(call, target):
                low = TileProducts.like(tile).emit_rows(panels[0], low, high)
            for count in sorted({int(config["rows"]), min(int(config["rows"]), 4), 1}, reverse=True):
                turns = bind(tirx.floordiv(high - low, count))
                with T.serial(0, turns) as i:
                    tile.emit(panels, bind(low + i64(i) * count), count)
                low = bind(low + turns * count)

        with T.parallel(0, blocks * tasks) as t:
            task(i64(t))
    return done()


def _has_tiles(call: KernelCall, target: Target) -> bool:
    """Whether the rows of a step are many enough for tile registers, and the target has them."""
    return call.phase != "decode" and tiles.has(target, tiles.INT8)


def _tile(
    call: KernelCall,
    target: Target,
    simd: Simd,
    buffers: dict[str, Expr],
    n: Expr,
    ahead: int,
    turn: int,
    tiled: bool = False,
) -> Products:
    """Emit the rounding of x's ``n`` rows; what multiplies them. ``tiled``: tile registers are to take them, too."""
    at, how = _geometry(call), scheme(call.attr("scheme"))
    dot = Dot(simd, target, at.bits, turn)
    # What products lack: dot's codes are those of the scheme less a bias, and a symmetric scheme's zero is half their range.
    start = dot.bias - (1 << (at.bits - 1)) if how.offset == "none" else dot.bias
    rows = quantized_rows.workspace(n, at.columns, min(at.record // at.sets, BLOCK), start, how.offset, tiles.ROWS if tiled else 1)
    quantized_rows.quantize(simd, buffers["x"], n, at.k, rows)
    # The bits of a float64, which of 1 are 1023 << 52 already: neither TVM nor LLVM takes them for more than some number.
    beyond = bind(tirx.reinterpret("int64", tirx.Cast("float64", n)))
    return Products(call, dot, simd, buffers, rows, at, ahead, beyond)


def rows_kernel(call: KernelCall, target: Target, x: Expr, out: Expr, n: Expr) -> RowsKernel:
    """The layer's product for other kernels: rows of ``x`` times whichever weight has the call's shape, a panel a piece."""
    tile = _tile(call, target, Simd(target), {"x": x, "out": out}, n, AHEAD, _turns(target, _geometry(call))[0])

    def of(weight: dict[str, Expr]) -> Callable[[Expr, Expr, int], None]:
        return lambda panel, first, count: tile.over(weight).emit([panel], first, count)

    return RowsKernel(_geometry(call).panels, of)


def _names(call: KernelCall) -> list[str]:
    optional = [name for name in ("bias", "residual") if call.attr(name)]
    return ["x", "panels", *optional, "out"]


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.linear import reference as linear_reference

    named = dict(zip(_names(call), arrays, strict=False))
    weight = layout_panel.unpack({"panels": named.pop("panels")}, scheme(call.attr("scheme")), call.attr("o"), call.attr("k"))
    return linear_reference(weight=weight.dequantize(), **named, activation=call.attr("activation"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    sizes = {"float32": 4, "uint8": 1}
    moved = sum(int(np.prod(s.bind(symbols))) * sizes[s.dtype] for s in (*call.args, call.result))
    n, k = call.args[0].bind(symbols)
    return moved, 2 * n * k * int(call.attr("o"))
