"""``llmc.quantized_take`` on any GPU: rows of a quantized embedding, from the matrix that the output layer multiplies.

A thread for eight columns of a row. The values are those of :meth:`QuantizedTensor.dequantize`, rounded once to the result's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.gpu import layout_mma
from llmc.schedules.gpu.emit import STORAGE, Symbols, arguments, bind, ceildiv, common_lanes, flat, function, i64, store_all, when
from llmc.schedules.gpu.layout_mma import UNIT
from llmc.schedules.gpu.quantized_call import BYTES
from llmc.schedules.gpu.quantized_units import Units
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.quantized_take"
OP = "llmc.quantized_take"


def _call(o: int, k: int, name: str, dtype: str = "bfloat16") -> KernelCall:
    args = (TensorSpec(("n",), "int32"), *layout_mma.parts(scheme(name), o, k).values())
    attrs = {"scheme": name, "layout": layout_mma.NAME, "o": o, "k": k}
    return KernelCall(OP, args, TensorSpec(("n", k), dtype), tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "embedding_128256x4096_int4_g128": _call(128256, 4096, "int4_g128"),
    "small_80x128_int4_g64": _call(80, 128, "int4_g64"),
    "odd_37x101_q4_1_f16": _call(37, 101, "q4_1", "float16"),
    "odd_33x45_int8_f32": _call(33, 45, "int8", "float32"),
    "zero_point_19x264": _call(19, 264, "int4p_g128"),
    "fp8_40x96_f32": _call(40, 96, "fp8_e4m3", "float32"),
    "fp8_blocks_17x300": _call(17, 300, "fp8_e4m3_b128"),
    "q5_1_16x64_f32": _call(16, 64, "q5_1", "float32"),
    "int3_g256_18x520_f32": _call(18, 520, "int3_g256", "float32"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if (
        call.op != OP
        or not isinstance(target, GpuTarget)
        or call.attr("layout") != layout_mma.NAME
        or call.result.dtype not in STORAGE
    ):
        return None
    return f"{call.attr('scheme')} rows, {UNIT} columns a thread"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    how, symbols = scheme(call.attr("scheme")), Symbols()
    o, k = int(call.attr("o")), int(call.attr("k"))
    names = list(layout_mma.parts(how, o, k))
    specs = dict(zip(["ids", *names, "out"], (*call.args, call.result), strict=True))
    lanes = common_lanes(target, [call.result.dtype], UNIT, k)
    with function(f"quantized_take_{how.name}_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n, count = symbols.dim(call.args[0].shape[0]), ceildiv(k, UNIT)
        units = Units(how, o, k, {name: buffers[name] for name in names})

        def one(index: Expr) -> None:
            row, unit = bind(tirx.floordiv(index, count)), bind(tirx.floormod(index, count))
            values = [bind(v) for v in units.load(bind(i64(buffers["ids"][row])), unit)]
            for e in range(0, UNIT, lanes):

                def keep(e: int = e) -> None:
                    store_all(buffers["out"], values[e : e + lanes], row, unit * UNIT + e)

                if k % UNIT:
                    when(unit * UNIT + e < k, keep)
                else:
                    keep()

        flat(target, n * count, one)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    """The rows of the dequantized matrix, float64."""
    ids, *parts = arrays
    how, o, k = scheme(call.attr("scheme")), call.attr("o"), call.attr("k")
    named = dict(zip(layout_mma.parts(how, o, k), parts, strict=True))
    return layout_mma.unpack(named, how, o, k).take(ids).dequantize().astype(np.float64)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """The rows' share of the parts, ids and results moved once; a product to a value."""
    n, k = call.result.bind(symbols)
    parts = sum(int(np.prod(s.bind({}))) * BYTES[s.dtype] for s in call.args[1:])
    return n * parts // int(call.attr("o")) + n * BYTES["int32"] + n * k * BYTES[call.result.dtype], n * k
