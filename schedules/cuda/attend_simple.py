"""``llmc.attend`` on any GPU from sm_80 on: every head size, page size, mask and dtype, in both phases.

A thread block takes one row and one query head, and goes over its positions in chunks of ``CHUNK`` with an online softmax (Milakov
& Gimelshein, 2018). First a thread has a position and computes its score, then a thread has an element of the values
and adds up the chunk. Chunks start at multiples of ``CHUNK``, so a row has the same bits whatever else is in the batch.
Heads of a group do not share their keys: it is the fallback behind the tensor core families.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cuda.emit import (
    STORAGE,
    WARP,
    WIDTH,
    Symbols,
    arguments,
    bind,
    block_sum,
    each,
    f32,
    function,
    i64,
    lane_max,
    launch,
    load,
    read,
    registers,
    shared,
    store,
    store_all,
    vector_lanes,
)
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cuda.attend_simple"
OP = "llmc.attend"
CHUNK = 128
"""Positions of a chunk, and threads of a block."""

MASKED = -1e30
"""The score of a position a row may not see: finite, so that a difference of two of them is no NaN."""


def _call(
    hq: int, hk: int, d: int, dv: int = 0, page_size: int = 16, dtype: str = "bfloat16", phase: str = "extend", **attrs: Any
) -> KernelCall:
    dv = dv or d
    full = {"scale": d**-0.5, "window": -1, "chunk": -1, "softcap": 0.0, "sinks": 0, "page_size": page_size, "v_dim": dv, **attrs}
    n = "b" if phase == "decode" else "n"
    args = [
        TensorSpec((n, hq, d), dtype), TensorSpec(("num_pages", hk, page_size * (d + dv)), dtype), TensorSpec(("b", "m"), "int32"),
        TensorSpec(("b",), "int32"), TensorSpec(("b+1",), "int32"),
    ]  # fmt: skip
    if full["sinks"]:
        args.append(TensorSpec((hq,), dtype))
    return KernelCall(OP, tuple(args), TensorSpec((n, hq, dv), dtype), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "heads_32x8_128": _call(32, 8, 128),
    "decode_64": _call(6, 2, 64, phase="decode"),
    "extend_80_f16": _call(2, 2, 80, page_size=32, dtype="float16"),
    "odd_20_12_softcap_f32": _call(6, 2, 20, 12, page_size=3, dtype="float32", softcap=3.0),
    "odd_13_sinks_window": _call(2, 1, 13, 200, page_size=5, sinks=1, window=9),
    "chunked_decode": _call(4, 1, 32, page_size=7, chunk=9, dtype="float16", phase="decode"),
    "window_decode_sinks": _call(4, 2, 96, window=150, sinks=1, phase="decode"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cuda":
        return None
    values = [*call.args[:2], *call.args[5:], call.result]
    if any(s.dtype not in STORAGE for s in values) or not all(isinstance(d, int) for s in values for d in s.shape[1:]):
        return None
    return "a block to a row and a head, float32 multiply-adds"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    hq, d = (int(v) for v in call.args[0].shape[1:])
    names = ["q", "kv_pages", "block_table", "seq_lens", "q_indptr", "sinks"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
    with function(f"attend_simple_{call.phase}_{hq}x{d}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n, sequences = symbols.dim(call.args[0].shape[0]), symbols.dim(call.args[3].shape[0])
        with launch(n, CHUNK, hq) as (thread, row, head):
            sequence, position = _place(call, buffers, row, sequences)
            _attend(call, buffers, thread, row, head, sequence, position)
    return done()


def _place(call: KernelCall, buffers: dict[str, Expr], row: Expr, sequences: Expr) -> tuple[Expr, Expr]:
    """The sequence of a row and the row's position in it."""
    lengths, starts = buffers["seq_lens"], buffers["q_indptr"]
    if call.phase == "decode":
        return row, bind(i64(lengths[row]) - 1)
    found = registers(1, "int64")
    store(found, i64(0), 0)
    with T.While(tirx.And(found[0] + 1 < sequences, i64(starts[found[0] + 1]) <= row)):
        store(found, found[0] + 1, 0)
    sequence = bind(found[0])
    length = bind(i64(lengths[sequence]))
    # Rows behind the last sequence are padding: they repeat its last position rather than read past its pages.
    return sequence, bind(tirx.min(length - i64(starts[sequence + 1]) + row, length - 1))


def _attend(
    call: KernelCall, buffers: dict[str, Expr], thread: Expr, row: Expr, head: Expr, sequence: Expr, position: Expr
) -> None:
    hq, d = (int(v) for v in call.args[0].shape[1:])
    dv, page_size = int(call.attr("v_dim")), int(call.attr("page_size"))
    window, span = int(call.attr("window")), int(call.attr("chunk"))
    pages, table = buffers["kv_pages"], buffers["block_table"]
    kv_head = bind(tirx.floordiv(head, hq // int(call.args[1].shape[1])))
    lanes = vector_lanes(call.args[1].dtype, d, page_size * (d + dv))

    query, weights, where = shared(d), shared(CHUNK), shared(CHUNK, "int32")
    maxima = shared(CHUNK // WARP)
    top, total, base = registers(1), registers(1), registers(1, "int64")
    sums = registers(-(-dv // CHUNK))
    each(thread, CHUNK, d, lambda item, _: store(query, load(buffers["q"], row, head, item)[0], item))
    store(top, f32(MASKED), 0)
    store(total, f32(0.0), 0)
    for i in range(-(-dv // CHUNK)):
        store(sums, f32(0.0), i)
    first = registers(1, "int64")
    store(first, i64(0), 0)
    if window > 0:
        store(first, tirx.max(first[0], position - (window - 1)), 0)
    if span > 0:
        store(first, tirx.max(first[0], tirx.floordiv(position, span) * span), 0)
    low = bind(first[0])
    store(base, tirx.floordiv(low, CHUNK) * CHUNK, 0)
    _sync()

    with T.While(base[0] <= position):
        start = bind(base[0])
        mine = bind(start + i64(thread))
        visible = bind(tirx.all(mine >= low, mine <= position))
        # Positions out of sight read one in sight: what lies behind the end of a sequence may be no page at all.
        at = bind(tirx.max(low, tirx.min(mine, position)))
        page = bind(table[sequence, tirx.floordiv(at, page_size)])
        slot = bind(tirx.floormod(at, page_size))
        store(where, page, thread)
        dot = registers(1)
        store(dot, f32(0.0), 0)
        with T.serial(0, d // lanes) as step:
            values = load(pages, i64(page), kv_head, slot * d + i64(step) * lanes, lanes=lanes)
            for i, value in enumerate(values):
                store(dot, dot[0] + value * read(query, step * lanes + i), 0)
        score = bind(tirx.Select(visible, _scale(call, dot[0]), f32(MASKED)))

        warp_top, _ = lane_max(score, bind(thread))
        with T.If(tirx.floormod(thread, WARP).equal(0)), T.Then():
            store(maxima, warp_top, tirx.floordiv(thread, WARP))
        _sync()
        highest = top[0]
        for warp in range(CHUNK // WARP):
            highest = tirx.max(highest, read(maxima, warp))
        new_top = bind(highest)
        correction = bind(tirx.exp(top[0] - new_top))
        weight = bind(tirx.Select(visible, tirx.exp(score - new_top), f32(0.0)))
        store(weights, weight, thread)
        store(top, new_top, 0)
        # The sum's barrier also makes the weights and pages of all threads visible.
        store(total, total[0] * correction + block_sum(weight, thread, CHUNK), 0)

        begin, end = bind(tirx.max(low - start, 0)), bind(tirx.min(position - start + 1, CHUNK))

        def add(item: Expr, step: int) -> None:
            store(sums, sums[step] * correction, step)
            with T.serial(0, end - begin) as j:
                p = bind(begin + i64(j))
                element = page_size * d + tirx.floormod(start + p, page_size) * dv + item
                store(sums, sums[step] + read(weights, p) * load(pages, i64(where[p]), kv_head, element)[0], step)

        each(thread, CHUNK, dv, add)
        _sync()
        store(base, start + CHUNK, 0)

    if "sinks" in buffers:
        sink = load(buffers["sinks"], head)[0]
        final = bind(tirx.max(top[0], sink))
        shrink = bind(tirx.exp(top[0] - final))
        store(total, total[0] * shrink + tirx.exp(sink - final), 0)
    else:
        shrink = f32(1.0)
    # A sequence without positions (padding of a batch) has a sum of 0, and a result of 0.
    factor = bind(tirx.Select(total[0] > 0, shrink / total[0], f32(0.0)))
    each(thread, CHUNK, dv, lambda item, step: store_all(buffers["out"], [bind(sums[step] * factor)], row, head, item))


def _scale(call: KernelCall, dot: Expr) -> Expr:
    score, softcap = dot * f32(call.attr("scale")), float(call.attr("softcap"))
    return score if softcap == 0 else f32(softcap) * tirx.tanh(score * f32(1 / softcap))


def _sync() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import attend_reference

    attrs = {name: value for name, value in call.attrs if name != "sinks"}
    return attend_reference(*arrays, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """``context``: the positions that each of the b sequences holds; all of them are read once and multiplied by every row."""
    n, hq, d = call.args[0].bind(symbols)
    values = d + int(call.attr("v_dim"))
    cache = symbols["b"] * symbols["context"] * int(call.args[1].shape[1]) * values * WIDTH[call.args[1].dtype]
    return cache + WIDTH[call.args[0].dtype] * n * hq * values, 2 * n * hq * values * symbols["context"]
