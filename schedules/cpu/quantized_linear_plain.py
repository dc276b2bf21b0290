"""``llmc.quantized_linear`` on a CPU over weights of :mod:`.layout_plain`, for schemes that no faster layout takes.

A task is one output of a block of rows: the weight's row is turned into floats a vector at a time, and a vector serves a tile of
rows of x. Sums of a row are the same in every tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import layout_plain
from llmc.schedules.cpu.emit import (
    Simd,
    Symbols,
    arguments,
    bind,
    ceildiv,
    each_vector,
    f32,
    function,
    i64,
    local,
    read,
    store,
)
from llmc.schedules.cpu.math import ACTIVATIONS, Math
from llmc.schedules.cpu.quantized_plain import Weight
from llmc.schedules.cpu.rows_kernel import RowsKernel
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.quantized_linear_plain"
OP = "llmc.quantized_linear"
ROW_BLOCK = 64


def _call(o: int, k: int, name: str, phase: str = "extend", **attrs: Any) -> KernelCall:
    args = [TensorSpec(("n", k), "float32"), *layout_plain.parts(scheme(name), o, k).values()]
    if attrs.get("bias"):
        args.append(TensorSpec((o,), "float32"))
    if attrs.get("residual"):
        args.append(TensorSpec(("n", o), "float32"))
    full = {"activation": "none", "bias": 0, "residual": 0, "scheme": name, "layout": layout_plain.NAME, "o": o, "k": k, **attrs}
    return KernelCall(OP, tuple(args), TensorSpec(("n", o), "float32"), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "fp8_e4m3_96x80": _call(96, 80, "fp8_e4m3", phase="decode"),
    "fp8_e4m3_b128_130x200_bias": _call(130, 200, "fp8_e4m3_b128", bias=1, activation="silu"),
    "mxfp4_33x70_residual": _call(33, 70, "mxfp4", residual=1),
    "nf4_19x100": _call(19, 100, "nf4", bias=1, residual=1, activation="gelu"),
    "iq4_nl_24x64": _call(24, 64, "iq4_nl", activation="relu2"),
    "int4p_g64_17x100": _call(17, 100, "int4p_g64"),
    "int3z_g16_5x33_f32": _call(5, 33, "int3z_g16_f32", activation="gelu_tanh"),
    "int8_7x45_bf16": _call(7, 45, "int8_bf16", activation="relu"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.attr("layout") != layout_plain.NAME:
        return None
    if call.attr("activation") not in ACTIVATIONS or len(call.args[0].shape) != 2:
        return None
    return f"{call.attr('scheme')} codes row by row, float activations"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``rows``: rows of x that share a vector of weights."""
    return {"rows": [4, 8, 2]}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    o, k, how = int(call.attr("o")), int(call.attr("k")), scheme(call.attr("scheme"))
    names = _names(call)
    with function(f"quantized_linear_plain_{o}x{k}") as done:
        buffers = dict(zip(names, arguments(symbols, **dict(zip(names, (*call.args, call.result), strict=True))), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        weight = Weight(simd, how, {name: buffers[name] for name in layout_plain.parts(how, o, k)}, k)

        with T.parallel(0, ceildiv(n, ROW_BLOCK) * o) as task:
            t = i64(task)
            output = bind(tirx.floormod(t, o))
            low = bind(tirx.floordiv(t, o) * ROW_BLOCK)
            high = bind(tirx.min(low + ROW_BLOCK, n))
            for count in sorted({int(config["rows"]), 1}, reverse=True):
                tiles = bind(tirx.floordiv(high - low, count))
                with T.serial(0, tiles) as i:
                    _tile(call, simd, weight, buffers, output, bind(low + i64(i) * count), count, k)
                low = bind(low + tiles * count)
    return done()


def rows_kernel(call: KernelCall, target: Target, x: Expr, out: Expr, n: Expr) -> RowsKernel:
    """The layer's product for other kernels: rows of ``x`` times whichever weight has the call's shape, an output a piece."""
    simd, o, k, how = Simd(target), int(call.attr("o")), int(call.attr("k")), scheme(call.attr("scheme"))

    def of(weight: dict[str, Expr]) -> Callable[[Expr, Expr, int], None]:
        buffers = {"x": x, "out": out, **weight}
        matrix = Weight(simd, how, buffers, k)
        return lambda output, first, count: _tile(call, simd, matrix, buffers, output, first, count, k)

    return RowsKernel(o, of)


def _tile(
    call: KernelCall, simd: Simd, weight: Weight, buffers: dict[str, Expr], output: Expr, first: Expr, count: int, k: int
) -> None:
    """One output of ``count`` rows from ``first`` on."""
    wide = simd.lanes
    sums, rests = [local(wide) for _ in range(count)], [local(1) for _ in range(count)]
    for total, rest in zip(sums, rests, strict=True):
        store(total, simd.splat(0.0, wide), 0, lanes=wide)
        store(rest, f32(0.0), 0)

    def group(index: Expr, size: int) -> None:
        scales = weight.scales(output, index)
        start = bind(index * weight.group)

        def piece(column: Expr, lanes: int) -> None:
            w = weight.load(output, start + column, lanes, scales)
            for i in range(count):
                x = simd.load(buffers["x"], first + i, start + column, lanes=lanes)
                if lanes == wide:
                    store(sums[i], simd.fma(w, x, read(sums[i], 0, lanes=wide)), 0, lanes=wide)
                else:
                    store(rests[i], read(rests[i], 0) + simd.total(bind(w * x)), 0)

        each_vector(size, wide, piece)

    whole, rest = divmod(k, weight.group)
    with T.serial(0, whole) as g:
        group(i64(g), weight.group)
    if rest:
        group(i64(whole), rest)
    for i in range(count):
        value = bind(simd.total(read(sums[i], 0, lanes=wide)) + read(rests[i], 0))
        if call.attr("bias"):
            value = value + simd.load(buffers["bias"], output)
        value = Math(simd, 1).activate(call.attr("activation"), value)
        if call.attr("residual"):
            value = value + simd.load(buffers["residual"], first + i, output)
        store(buffers["out"], simd.narrow(value, call.result.dtype, 1), first + i, output)


def _names(call: KernelCall) -> list[str]:
    parts = layout_plain.parts(scheme(call.attr("scheme")), int(call.attr("o")), int(call.attr("k")))
    return ["x", *parts, *(name for name in ("bias", "residual") if call.attr(name)), "out"]


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.linear import reference as linear_reference

    how, o, k = scheme(call.attr("scheme")), int(call.attr("o")), int(call.attr("k"))
    named = dict(zip(_names(call), arrays, strict=False))
    parts = {name: named.pop(name) for name in layout_plain.parts(how, o, k)}
    weight = layout_plain.unpack(parts, how, o, k).dequantize()
    return linear_reference(weight=weight, **named, activation=call.attr("activation"))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
    moved = sum(int(np.prod(s.bind(symbols))) * sizes[s.dtype] for s in (*call.args, call.result))
    n, k = call.args[0].bind(symbols)
    return moved, 2 * n * k * int(call.attr("o"))
