"""``llmc.quantized_take`` on a CPU: rows of an embedding stored in :mod:`.layout_plain`. Ids outside the table are clipped."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import layout_plain
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, each_vector, function, i64, parallel_if, store
from llmc.schedules.cpu.quantized_plain import Weight
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.quantized_take_plain"
OP = "llmc.quantized_take"


def _call(o: int, k: int, name: str) -> KernelCall:
    args = (TensorSpec(("n",), "int32"), *layout_plain.parts(scheme(name), o, k).values())
    attrs = {"scheme": name, "layout": layout_plain.NAME, "o": o, "k": k, "out_dtype": "float32"}
    return KernelCall(OP, args, TensorSpec(("n", k), "float32"), tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "fp8_e4m3_40x96": _call(40, 96, "fp8_e4m3"),
    "odd_37x101_mxfp4": _call(37, 101, "mxfp4"),
    "odd_19x70_nf4": _call(19, 70, "nf4"),
    "odd_33x45_int4p": _call(33, 45, "int4p_g32"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or call.attr("layout") != layout_plain.NAME:
        return None
    return f"{call.attr('scheme')} rows"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    o, k, how = int(call.attr("o")), int(call.attr("k")), scheme(call.attr("scheme"))
    parts = layout_plain.parts(how, o, k)
    with function(f"quantized_take_plain_{o}x{k}") as done:
        ids, *stored, out = arguments(symbols, ids=call.args[0], **parts, out=call.result)
        weight = Weight(simd, how, dict(zip(parts, stored, strict=True)), k)

        def row(n: Expr) -> None:
            token = bind(tirx.max(tirx.min(i64(ids[n]), i64(o - 1)), i64(0)))

            def group(index: Expr, size: int) -> None:
                scales = weight.scales(token, index)
                start = bind(index * weight.group)

                def piece(column: Expr, lanes: int) -> None:
                    value = weight.load(token, start + column, lanes, scales)
                    store(out, simd.narrow(value, call.result.dtype, lanes), n, start + column, lanes=lanes)

                each_vector(size, simd.lanes, piece)

            whole, rest = divmod(k, weight.group)
            with T.serial(0, whole) as g:
                group(i64(g), weight.group)
            if rest:
                group(i64(whole), rest)

        parallel_if(symbols.dim("n"), k, lambda i: row(i64(i)))
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    how, o, k = scheme(call.attr("scheme")), int(call.attr("o")), int(call.attr("k"))
    named = dict(zip(layout_plain.parts(how, o, k), arrays[1:], strict=True))
    return layout_plain.unpack(named, how, o, k).dequantize()[np.clip(arrays[0], 0, o - 1)].astype(np.float64)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    n, k = call.args[0].bind(symbols)[0], int(call.attr("k"))
    codes = k / 2 if layout_plain.halved(scheme(call.attr("scheme"))) else k
    return n * int(codes + 4 * k), 2 * n * k
