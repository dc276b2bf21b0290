"""``llmc.quantized_take`` on a CPU: rows of a quantized embedding as float32, from the panels that the output layer multiplies."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import layout_panel
from llmc.schedules.cpu.emit import (
    Simd,
    Symbols,
    arguments,
    bind,
    elements,
    function,
    i64,
    parallel_if,
    read,
    shuffle,
    store,
)
from llmc.schedules.cpu.layout_panel import BLOCK, PLANES, ROWS, geometry
from llmc.schedules.cpu.two_level_scales import TwoLevel
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.quantized_take"
OP = "llmc.quantized_take"


def _call(o: int, k: int, name: str) -> KernelCall:
    args = (TensorSpec(("n",), "int32"), *layout_panel.parts(scheme(name), o, k).values())
    attrs = {"scheme": name, "layout": layout_panel.NAME, "o": o, "k": k}
    return KernelCall(OP, args, TensorSpec(("n", k), "float32"), tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "embedding_500x576_q8_0": _call(500, 576, "q8_0"),
    "odd_37x101_q4_1": _call(37, 101, "q4_1"),
    "odd_19x70_int4_g64": _call(19, 70, "int4_g64"),
    "odd_33x45_int8": _call(33, 45, "int8"),
    "q5_0_40x96": _call(40, 96, "q5_0"),
    "q2_k_17x256": _call(17, 256, "q2_k"),
    "q3_k_19x256": _call(19, 256, "q3_k"),
    "q4_k_35x512": _call(35, 512, "q4_k"),
    "q6_k_40x256": _call(40, 256, "q6_k"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.attr("layout") != layout_panel.NAME or call.result.dtype != "float32":
        return None
    return f"{call.attr('scheme')} rows out of panels"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    kind = scheme(call.attr("scheme"))
    at = geometry(kind, int(call.attr("o")), int(call.attr("k")))
    with function(f"quantized_take_{at.o}x{at.k}") as done:
        ids, panels, out = arguments(symbols, ids=call.args[0], panels=call.args[1], out=call.result)

        def row(n: Expr) -> None:
            token = bind(i64(ids[n]))
            panel, lane = bind(tirx.floordiv(token, ROWS)), bind(tirx.floormod(token, ROWS))

            def one(start: Expr) -> Expr:
                """A scale or a minimum."""
                raw = read(panels, panel, start, lanes=at.scale_bytes)
                return bind(simd.widen(tirx.reinterpret(at.scale_dtype, raw), at.scale_dtype, 1))

            def block(index: Expr, count: int) -> None:
                record = bind(tirx.floordiv(index, at.blocks) * at.record_bytes)
                base = bind(record + tirx.floormod(index, at.blocks) * at.block_bytes + lane * 4)
                two_level = TwoLevel(simd, kind, at, lambda start, lanes: read(panels, panel, start, lanes=lanes))
                for s in range(at.sets):
                    if at.field_bytes:
                        scale = two_level.scale(record, s, lane, 1)
                    else:
                        scale = one(record + at.scales_at + (i64(s * ROWS) + lane) * at.scale_bytes)
                    offset_at = bind(record + at.offsets_at + (i64(s * ROWS) + lane) * at.offset_bytes)
                    if kind.offset == "minimum":
                        minimum = two_level.minimum(record, s, lane, 1) if at.field_bytes else one(offset_at)
                    size = BLOCK // at.sets
                    for quad in range(s * size // 4, (s + 1) * size // 4):
                        code = tirx.Cast("float32x4", _quad(panels, panel, base, at.bits, quad))
                        if kind.offset == "none":
                            value = (code - simd.splat(float(1 << (at.bits - 1)), 4)) * simd.splat(scale, 4)
                        elif kind.offset == "zero_point":
                            zero = tirx.Cast("float32", read(panels, panel, offset_at))
                            value = (code - simd.splat(zero, 4)) * simd.splat(scale, 4)
                        else:
                            value = simd.fma(code, simd.splat(scale, 4), simd.splat(minimum, 4))
                        value = bind(value)
                        for start, width in elements(max(0, min(4, count - quad * 4)), 4):
                            piece = value if width == 4 else shuffle([value], range(start, start + width))
                            store(out, piece, n, index * BLOCK + (quad * 4 + start), lanes=width)

            whole, rest = divmod(at.k, BLOCK)
            with T.serial(0, whole) as b:
                block(bind(i64(b)), BLOCK)
            if rest:
                block(i64(whole), rest)

        parallel_if(symbols.dim("n"), at.k, lambda i: row(i64(i)))
    return done()


def _quad(panels: Expr, panel: Expr, base: Expr, bits: int, quad: int) -> Expr:
    """Codes 4 · quad .. 4 · quad + 3 of the row whose bytes of a block's first vector start at ``base``: int32x4."""
    code, low, start = None, 0, 0
    for plane in PLANES[bits]:
        v, field = divmod(quad, 8 // plane)
        raw = tirx.Cast("int32x4", read(panels, panel, base + (start + 64 * v), lanes=4))
        value = ((raw >> _splat(field * plane)) & _splat((1 << plane) - 1)) << _splat(low)
        code = value if code is None else code | value
        low, start = low + plane, start + 64 * plane
    return bind(code)


def _splat(value: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, "int32"), 4)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    weight = layout_panel.unpack({"panels": arrays[1]}, scheme(call.attr("scheme")), call.attr("o"), call.attr("k"))
    return weight.dequantize()[arrays[0]].astype(np.float64)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    at = geometry(scheme(call.attr("scheme")), int(call.attr("o")), int(call.attr("k")))
    n = call.args[0].bind(symbols)[0]
    return n * (at.panel_bytes // ROWS + 4 * at.k), 2 * n * at.k
