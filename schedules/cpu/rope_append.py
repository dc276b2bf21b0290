"""``llmc.rope_append`` on a CPU: head by head of the merged projection's rows, one task for each.

A head is normalised on the way into a workspace of its own if asked, rotated, and written to the result or to its slot; the
values are copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.dialect.rope_append import key_dim
from llmc.kv_layout import FLOATS, scheme_attr
from llmc.schedules.cpu.emit import (
    Simd,
    Symbols,
    arguments,
    bind,
    each_vector,
    f32,
    function,
    i64,
    local,
    parallel_if,
    read,
    shuffle,
    store,
    when,
)
from llmc.schedules.cpu.kv_codes import Side
from llmc.schedules.kv_pages import page_layout_of, pages_spec, stored_as
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.rope_append"
OP = "llmc.rope_append"


def _call(
    hq: int, hk: int, d: int, dv: int = 0, rotary: int = 0, page_size: int = 16, kv_dtype: str = "float32",
    interleaved: int = 0, norm: int = 0, offset: float = 0.0,
) -> KernelCall:  # fmt: skip
    dv, rotary = dv or d, rotary or d
    pages = pages_spec(kv_dtype, hk, page_size, d, dv)
    angle, weight = TensorSpec(("n", rotary), "float32"), TensorSpec((d,), "float32")
    rows = TensorSpec(("n", hq * d + hk * (d + dv)), "float32")
    args = (rows, angle, angle, TensorSpec(("n",), "int32"), pages, *([weight] * 2 * norm))
    attrs = {
        "heads": hq, "v_dim": dv, "page_size": page_size, "rotary_dim": rotary, "interleaved": interleaved, "norm": norm,
        "eps": 1e-6 * norm, "offset": offset, **scheme_attr(kv_dtype),
    }  # fmt: skip
    return KernelCall(OP, args, TensorSpec(("n", hq, d), "float32"), tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "smollm2": _call(9, 3, 64),
    "norm_16x8_128_bf16": _call(16, 8, 128, kv_dtype="bfloat16", norm=1),
    "partial_80_of_96_f16": _call(2, 2, 96, rotary=80, kv_dtype="float16"),
    "odd_20_12": _call(4, 2, 20, 12, page_size=5),
    "norm_offset_14": _call(6, 3, 14, page_size=3, norm=1, offset=1.0),
    "int8_64": _call(9, 3, 64, kv_dtype="int8"),
    "norm_int4_36": _call(4, 2, 36, page_size=7, kv_dtype="int4", norm=1),
    "partial_fp8_20_12": _call(4, 2, 20, 12, rotary=16, page_size=5, kv_dtype="fp8_e4m3"),
    "pairs_64": _call(4, 2, 64, interleaved=1),
    "pairs_partial_12_of_21_norm": _call(2, 1, 21, rotary=12, interleaved=1, norm=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu" or any(a.dtype != "float32" for a in call.args[:3]):
        return None
    stored = stored_as(call, call.args[4])
    if stored is None or any(a.dtype not in FLOATS for a in call.args[5:]):
        return None
    return f"heads of the merged projection one by one, keys and values to {stored} pages"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    held_spec = call.args[4]
    heads, kv_heads, dv = int(call.attr("heads")), int(held_spec.shape[1]), int(call.attr("v_dim"))
    page_size, rotary = int(call.attr("page_size")), int(call.attr("rotary_dim"))
    d = key_dim(int(call.args[0].shape[1]), heads, kv_heads, dv)
    layout = page_layout_of(call, held_spec, d, dv)
    turning, every = heads + kv_heads, heads + 2 * kv_heads
    names = ["qkv", "cos", "sin", "slot_mapping", "kv_pages", "q_weight", "k_weight"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
    with function(f"rope_append_{heads}x{kv_heads}x{d}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        qkv, cos, sin, slots, pages, out = (buffers[name] for name in (*names[:5], "out"))

        keys, values = (Side(simd, pages, layout, keys=keys) for keys in (True, False))

        def turn(row: Expr, column: Expr, weight: Expr | None, write: Any) -> None:
            """Normalise and rotate the head at ``column``; ``write(start, value, lanes)`` takes the result."""
            source: Any = qkv
            index: tuple[Expr, ...] = (row,)
            base = column
            if weight is not None:
                source, index, base = _normalised(simd, qkv, row, column, weight, d, call), (), i64(0)

            def at(start: Expr, lanes: int) -> Expr:
                return bind(simd.load(source, *index, base + start, lanes=lanes))

            def halves(start: Expr, lanes: int) -> None:
                second = start + rotary // 2
                a, b = at(start, lanes), at(second, lanes)
                for own, other, place in ((a, simd.splat(0.0, lanes) - b, start), (b, a, second)):
                    c, s = (simd.load(table, row, place, lanes=lanes) for table in (cos, sin))
                    write(place, simd.fma(own, c, bind(other * s)), lanes)

            def pairs(start: Expr, lanes: int) -> None:
                v = at(start, lanes)
                swapped = bind(shuffle([v], [lane ^ 1 for lane in range(lanes)]))
                even = tirx.floormod(tirx.Ramp(0, 1, lanes), tirx.Broadcast(tirx.const(2, "int32"), lanes))
                even = even.equal(tirx.Broadcast(tirx.const(0, "int32"), lanes))
                swapped = tirx.Select(even, simd.splat(0.0, lanes) - swapped, swapped)
                c, s = (simd.load(table, row, start, lanes=lanes) for table in (cos, sin))
                write(start, simd.fma(v, c, bind(swapped * s)), lanes)

            if call.attr("interleaved"):
                each_vector(rotary, simd.lanes, pairs)
            else:
                each_vector(rotary // 2, simd.lanes, halves)
            if d > rotary:
                each_vector(d - rotary, simd.lanes, lambda start, lanes: write(rotary + start, at(rotary + start, lanes), lanes))

        def task(t: Expr) -> None:
            row, head = bind(tirx.floordiv(i64(t), every)), bind(tirx.floormod(i64(t), every))
            slot = bind(i64(slots[row]))
            page, offset = bind(tirx.floordiv(slot, page_size)), bind(tirx.floormod(slot, page_size))

            def query() -> None:
                def write(start: Expr, value: Expr, lanes: int) -> None:
                    store(out, value, row, head, start, lanes=lanes)

                turn(row, head * d, buffers.get("q_weight"), write)

            def key() -> None:
                if layout.scheme is None:
                    turn(row, head * d, buffers.get("k_weight"), keys.writer(page, head - heads, offset))
                    return
                held = local(1, d)
                turn(row, head * d, buffers.get("k_weight"), lambda start, value, lanes: store(held, value, start, lanes=lanes))
                keys.write(page, head - heads, offset, lambda start, lanes: read(held, start, lanes=lanes))

            def value() -> None:
                column = bind(turning * d + (head - turning) * dv)
                values.write(page, head - turning, offset, lambda start, lanes: simd.load(qkv, row, column + start, lanes=lanes))

            when(head < heads, query, lambda: when(slot >= 0, lambda: when(head < turning, key, value)))

        parallel_if(symbols.dim(call.args[0].shape[0]) * every, 2 * d, task)
    return done()


def _normalised(simd: Simd, qkv: Expr, row: Expr, column: Expr, weight: Expr, d: int, call: KernelCall) -> Expr:
    """A workspace with the RMS-normalised head at ``column``: partial sums in a vector, and one for the tail."""
    lanes, held = simd.widest(d), local(1, d)
    acc, tail = local(lanes), local(1)
    store(acc, simd.splat(0.0, lanes), 0, lanes=lanes)
    store(tail, f32(0.0), 0)

    def add(start: Expr, width: int) -> None:
        value = bind(simd.load(qkv, row, column + start, lanes=width))
        store(held, value, start, lanes=width)
        if width == lanes:
            store(acc, simd.fma(value, value, read(acc, 0, lanes=lanes)), 0, lanes=lanes)
        else:
            store(tail, read(tail, 0) + simd.total(bind(value * value)), 0)

    each_vector(d, lanes, add)
    mean = (simd.total(read(acc, 0, lanes=lanes)) + read(tail, 0)) * f32(1.0 / d)
    root = tirx.call_llvm_pure_intrin("float32", "llvm.sqrt", mean + f32(call.attr("eps")))
    scale = bind(f32(1.0) / root)

    def multiply(start: Expr, width: int) -> None:
        gain = simd.load(weight, start, lanes=width) + simd.splat(call.attr("offset"), width)
        store(held, read(held, start, lanes=width) * simd.splat(scale, width) * gain, start, lanes=width)

    each_vector(d, lanes, multiply)
    return held


def reference(call: KernelCall, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from llmc.dialect.rope_append import reference as rope_append_reference

    return rope_append_reference(*arrays, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    rows, cos, sin = (int(np.prod(a.bind(symbols))) for a in call.args[:3])
    return 4 * (2 * rows + cos + sin), 3 * rows
