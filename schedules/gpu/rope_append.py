"""``llmc.rope_append`` on any GPU: a group of threads takes one head of one row of the merged projection.

Queries and keys are held in float32 registers, normalised if asked (sums by shuffles within the group) and rotated, queries to the
result and keys to their slot of the cache; heads of values are copied to theirs. Both halves of a rotated pair are in one thread.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from tvm import tirx

from llmc.dialect.rope_append import key_dim
from llmc.kv_layout import scheme_attr
from llmc.schedules.gpu.emit import (
    WIDTH,
    Symbols,
    Team,
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
    registers,
    shared,
    storable,
    store,
    store_all,
    sync,
    when,
)
from llmc.schedules.gpu.kv_codes import Side
from llmc.schedules.kv_pages import page_layout_of, pages_spec, stored_as
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.rope_append"
OP = "llmc.rope_append"
THREADS = 128


def make_call(
    hq: int, hk: int, d: int, dv: int = 0, rotary: int = 0, page_size: int = 16, dtype: str = "bfloat16", kv_dtype: str = "",
    table: str = "float32", interleaved: int = 0, norm: int = 0, offset: float = 0.0,
) -> KernelCall:  # fmt: skip
    dv, rotary, kv_dtype = dv or d, rotary or d, kv_dtype or dtype
    pages = pages_spec(kv_dtype, hk, page_size, d, dv)
    angle, weight = TensorSpec(("n", rotary), table), TensorSpec((d,), dtype)
    rows = TensorSpec(("n", hq * d + hk * (d + dv)), dtype)
    args = (rows, angle, angle, TensorSpec(("n",), "int32"), pages, *([weight] * 2 * norm))
    attrs = {
        "heads": hq, "v_dim": dv, "page_size": page_size, "rotary_dim": rotary, "interleaved": interleaved, "norm": norm,
        "eps": 1e-6 * norm, "offset": offset, **scheme_attr(kv_dtype),
    }  # fmt: skip
    return KernelCall(OP, args, TensorSpec(("n", hq, d), dtype), tuple(sorted(attrs.items())))


SHAPES: dict[str, KernelCall] = {
    "heads_32x8_128": make_call(32, 8, 128),
    "heads_32x8_64": make_call(32, 8, 64, table="bfloat16"),
    "norm_16x8_128": make_call(16, 8, 128, norm=1),
    "norm_offset_4x1_256_f16": make_call(4, 1, 256, page_size=32, dtype="float16", norm=1, offset=1.0),
    "partial_80_of_96": make_call(2, 2, 96, rotary=80, dtype="float16"),
    "odd_20_12_f32": make_call(4, 2, 20, 12, page_size=5, dtype="float32"),
    "norm_narrowed_14": make_call(6, 3, 14, page_size=3, dtype="float32", kv_dtype="bfloat16", norm=1),
    "int8_9x3x64": make_call(9, 3, 64, kv_dtype="int8"),
    "int4_norm_partial_57": make_call(3, 1, 57, 80, rotary=40, page_size=3, dtype="float16", kv_dtype="int4", norm=1),
    "pairs_64": make_call(4, 2, 64, interleaved=1),
    "pairs_partial_12_of_21_norm": make_call(2, 1, 21, rotary=12, dtype="float32", interleaved=1, norm=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not storable(call, target, ints=(3,), pages=4):
        return None
    return f"a group of threads for each head of the merged projection, {stored_as(call, call.args[4])} pages"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    rows_spec, held_spec = call.args[0], call.args[4]
    heads, kv_heads, dv = int(call.attr("heads")), int(held_spec.shape[1]), int(call.attr("v_dim"))
    page_size, rotary, pairs = int(call.attr("page_size")), int(call.attr("rotary_dim")), bool(call.attr("interleaved"))
    d = key_dim(int(rows_spec.shape[1]), heads, kv_heads, dv)
    layout = page_layout_of(call, held_spec, d, dv)
    turning, every = heads + kv_heads, heads + 2 * kv_heads
    span = rotary if pairs else rotary // 2
    # One width for all loads: it divides the turned part, every offset in a row, and the row's length.
    floats = [a.dtype for a in call.args if a.dtype in WIDTH]
    lanes = common_lanes(target, floats, gcd(span, d, rotary, dv))
    # A piece is what turns together: an element of each half, or whole pairs, by two loads where rows are not aligned to pairs.
    unit = max(lanes, 2) if pairs else lanes
    turned = span // unit
    pieces = turned + (d - rotary) // lanes
    group = 1 << (min(target.warp_size, pieces) - 1).bit_length()
    held_lanes = max(unit, lanes if pairs else 2 * lanes)
    steps = -(-pieces // group)
    names = ["qkv", "cos", "sin", "slot_mapping", "kv_pages", "q_weight", "k_weight"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}

    def chunks(piece: Expr) -> tuple[list[Expr], list[Expr]]:
        """Where the loads of ``piece`` start in a head, if it is turned and if it is passed."""
        if pairs:
            return [piece * unit + i for i in range(0, unit, lanes)], [rotary + (piece - turned) * lanes]
        return [piece * lanes, piece * lanes + span], [rotary + (piece - turned) * lanes]

    with function(f"rope_append_{heads}x{kv_heads}x{d}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        qkv, cos, sin, slots, pages, out = (buffers[name] for name in (*names[:5], "out"))
        count = symbols.dim(rows_spec.shape[0]) * every
        with launch(ceildiv(count, THREADS // group), THREADS) as (thread, block):
            at = bind(block * (THREADS // group) + i64(tirx.floordiv(thread, group)))
            member = tirx.floormod(thread, group)
            # A group without a head works on the last one, so that all threads take part in the sums.
            inside = bind(tirx.min(at, count - 1))
            head, row = bind(tirx.floormod(inside, every)), bind(tirx.floordiv(inside, every))
            slot = bind(i64(slots[row]))
            # Quotients of a negative slot would be out of range even where nothing is stored: TVM may load ahead of the test.
            page = bind(tirx.floordiv(tirx.max(slot, i64(0)), page_size))
            offset = bind(tirx.floormod(tirx.max(slot, i64(0)), page_size))
            held, total = registers(steps * held_lanes), registers(1, start=0.0)
            team = Team(target, thread, THREADS, group)
            # Keys of all heads meet their group's other elements here before they are quantized.
            keys = None if layout.scheme is None else shared(THREADS // group * d)
            own_key = bind(i64(tirx.floordiv(thread, group)) * d)

            def for_each_chunk(body: Any) -> None:
                """``body(start, place, turned)`` for the chunks of this thread: where in the head, and where in ``held``."""

                def piece_body(piece: Expr, step: int) -> None:
                    moving, passing = chunks(piece)

                    def run(starts: list[Expr], is_turned: bool) -> None:
                        body([(start, step * held_lanes + i * lanes) for i, start in enumerate(starts)], is_turned)

                    if pieces > turned:
                        when(piece < turned, lambda: run(moving, True), lambda: run(passing, False))
                    else:
                        run(moving, True)

                each(member, group, pieces, piece_body)

            def read_chunks(starts: list[tuple[Expr, int]], _: bool) -> None:
                for start, place in starts:
                    for i, value in enumerate(load(qkv, row, head * d + start, lanes=lanes)):
                        store(held, value, place + i)
                        if call.attr("norm"):
                            store(total, total[0] + held[place + i] * held[place + i], 0)

            when(head < turning, lambda: for_each_chunk(read_chunks))
            scale = f32(1.0)
            if call.attr("norm"):
                mean = team.sum(total[0], group) * f32(1.0 / d)
                scale = bind(f32(1.0) / tirx.sqrt(mean + f32(call.attr("eps"))))

            def scale_chunks(weight: Expr) -> Any:
                def body(starts: list[tuple[Expr, int]], _: bool) -> None:
                    for start, place in starts:
                        for i, w in enumerate(load(weight, start, lanes=lanes)):
                            store(held, held[place + i] * scale * (w + f32(call.attr("offset"))), place + i)

                return lambda: for_each_chunk(body)

            def result(starts: list[tuple[Expr, int]], is_turned: bool) -> list[tuple[Expr, list[Expr]]]:
                """The chunks of a piece after the rotation."""
                values = [[held[place + i] for i in range(lanes)] for _, place in starts]
                if not is_turned:
                    return [(starts[0][0], values[0])]
                flat = [v for chunk in values for v in chunk]
                size = len(flat)
                # The partner of each value: the neighbour in a pair, or the value of the other half.
                partner = [i ^ 1 for i in range(size)] if pairs else [(i + lanes) % size for i in range(size)]
                found = []
                for index, (start, _) in enumerate(starts):
                    c, s = load(cos, row, start, lanes=lanes), load(sin, row, start, lanes=lanes)
                    own = range(index * lanes, (index + 1) * lanes)
                    found.append(
                        (start, [flat[i] * c[j] + (flat[partner[i]] if partner[i] < i else -flat[partner[i]]) * s[j]
                                 for j, i in enumerate(own)])
                    )  # fmt: skip
                return found

            def write_chunks(starts: list[tuple[Expr, int]], is_turned: bool) -> None:
                for start, values in result(starts, is_turned):
                    values = [bind(v) for v in values]

                    def query(start: Expr = start, values: list[Expr] = values) -> None:
                        store_all(out, values, row, head, start)

                    def key(start: Expr = start, values: list[Expr] = values) -> None:
                        if keys is not None:
                            for i, v in enumerate(values):  # one by one, as they are read: TVM wants one width for all accesses
                                store(keys, v, own_key + start + i)
                            return
                        when(slot >= 0, lambda: store_all(pages, values, page, head - heads, offset * d + start))

                    when(head < heads, query, key)

            def turn() -> None:
                if call.attr("norm"):
                    when(head < heads, scale_chunks(buffers["q_weight"]), scale_chunks(buffers["k_weight"]))
                for_each_chunk(write_chunks)

            def copy() -> None:
                def piece_of_value(piece: Expr, _: int) -> None:
                    kv_head = head - turning
                    values = load(qkv, row, turning * d + kv_head * dv + piece * lanes, lanes=lanes)
                    store_all(pages, values, page, kv_head, page_size * d + offset * dv + piece * lanes)

                when(slot >= 0, lambda: each(member, group, dv // lanes, piece_of_value))

            if keys is None:
                when(at < count, lambda: when(head < turning, turn, copy))
            else:
                when(at < count, lambda: when(head < turning, turn))
                sync()
                for is_key, first in ((True, heads), (False, turning)):
                    mine = bind(tirx.all(at < count, slot >= 0, head >= first, head < first + kv_heads))
                    kv_head = bind(tirx.max(tirx.min(head - first, kv_heads - 1), 0))
                    source, place = (keys, (own_key,)) if is_key else (qkv, (row, turning * d + kv_head * dv))

                    def element(e: Expr, source: Expr = source, place: tuple[Expr, ...] = place) -> Expr:
                        return load(source, *place[:-1], place[-1] + e)[0]

                    Side(target, pages, layout, keys=is_key).write(team, group, mine, page, kv_head, offset, element)
    return done()


def reference(call: KernelCall, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from llmc.dialect.rope_append import reference as rope_append_reference

    return rope_append_reference(*arrays, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    rows, cos, sin = (int(np.prod(a.bind(symbols))) for a in call.args[:3])
    return rows * 2 * WIDTH[call.args[0].dtype] + (cos + sin) * WIDTH[call.args[1].dtype], 3 * rows
