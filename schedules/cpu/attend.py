"""``llmc.attend`` on a CPU: paged attention for decode rows and ragged extend rows, with the same arithmetic in both phases.

A task is a block of rows and one KV head. In the decode phase a row is a sequence; where rows are few and the cache holds more
than one segment of positions, a task is one segment of one row, and a second phase merges what they found. In the extend phase a
block of packed rows may touch several sequences, which are found through ``q_indptr`` and done one after the other.
:mod:`llmc.schedules.cpu.flash` is what happens inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.kv_layout import FLOATS, scheme_attr
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, ceildiv, function, i64, keep, local, read, store, when
from llmc.schedules.cpu.flash import Flash, Heads, Scores
from llmc.schedules.cpu.kv_codes import Side
from llmc.schedules.cpu.states import SEGMENT, width
from llmc.schedules.kv_pages import page_layout_of, pages_spec, slot_bytes, stored_as
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.attend"
OP = "llmc.attend"
TASKS = 64
"""Pairs of row and KV head that are enough tasks for the threads of a processor without splitting them."""


def _call(
    hq: int, hk: int, d: int, dv: int = 0, page_size: int = 16, dtype: str = "float32", phase: str = "extend", **attrs: Any
) -> KernelCall:
    dv = dv or d
    full = {"scale": d**-0.5, "window": -1, "chunk": -1, "softcap": 0.0, "sinks": 0, "page_size": page_size, "v_dim": dv}
    full |= {**scheme_attr(dtype), **attrs}
    n = "b" if phase == "decode" else "n"
    args = [
        TensorSpec((n, hq, d), "float32"),
        pages_spec(dtype, hk, page_size, d, dv),
        TensorSpec(("b", "m"), "int32"),
        TensorSpec(("b",), "int32"),
        TensorSpec(("b+1",), "int32"),
    ]
    if full["sinks"]:
        args.append(TensorSpec((hq,), "float32"))
    return KernelCall(OP, tuple(args), TensorSpec((n, hq, dv), "float32"), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "smollm2_extend": _call(9, 3, 64),
    "smollm2_decode": _call(9, 3, 64, phase="decode"),
    "mha_80_f16": _call(2, 2, 80, page_size=5, dtype="float16"),
    "window_96_bf16": _call(4, 2, 96, dtype="bfloat16", window=7),
    "odd_20_12_softcap": _call(6, 2, 20, 12, page_size=3, softcap=3.0),
    "tiny_12_sinks": _call(2, 1, 12, 20, page_size=16, sinks=1, window=5),
    "chunked_128": _call(8, 1, 128, page_size=7, chunk=9),
    "int8_decode": _call(9, 3, 64, dtype="int8", phase="decode"),
    "int8_odd_20_12_softcap_sinks": _call(6, 2, 20, 12, page_size=3, dtype="int8", softcap=3.0, sinks=1),
    "int4_80_57_window": _call(2, 2, 80, 57, page_size=3, dtype="int4", window=40),
    "fp8_96_chunked": _call(4, 1, 96, dtype="fp8_e4m3", chunk=50),
    "window_decode": _call(4, 2, 96, dtype="bfloat16", window=7, phase="decode"),
    "wide_window_sinks": _call(4, 2, 16, page_size=8, window=300, sinks=1),
    "wide_window_decode": _call(4, 2, 16, page_size=8, window=300, sinks=1, phase="decode"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cpu":
        return None
    q, pages = call.args[0], call.args[1]
    sinks_ok = len(call.args) == 5 or call.args[5].dtype in FLOATS
    stored = stored_as(call, pages)
    if q.dtype != "float32" or stored is None or not sinks_ok:
        return None
    return f"online softmax over chunks of positions, {stored} pages"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``row_block``: rows of a task, which share one gathering of keys and values. ``queries``: of a register tile, which share
    the loads of keys and values."""
    group = int(call.args[0].shape[1]) // int(call.args[1].shape[1])
    # Of 32 registers 24 accumulate 6 queries, whole rows of a group, with 4 vectors of keys; of 16, 12 do 4 with 3.
    queries = [6 // group * group or 4, 4, 2, 8, 1] if Simd(target).registers >= 32 else [4, 6, 3, 2, 8, 1]
    queries = list(dict.fromkeys(queries))
    return {"row_block": [1] if call.phase == "decode" else [32, 64, 16, 128, 8], "queries": queries}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    hq, d = (int(v) for v in call.args[0].shape[1:])
    hk, block = int(call.args[1].shape[1]), int(config["row_block"])
    heads = Heads(hq // hk, d, int(call.attr("v_dim")), int(call.attr("page_size")), block, int(config["queries"]))
    layout = page_layout_of(call, call.args[1], d, heads.dv)
    scores = Scores(*(call.attr(name) for name in ("scale", "softcap", "window", "chunk")))
    names = ["q", "kv_pages", "block_table", "seq_lens", "q_indptr", "sinks"][: len(call.args)]
    specs = {**dict(zip(names, call.args, strict=True)), "out": call.result}
    with function(f"attend_{call.phase}_{hq}x{hk}x{d}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n, sequences = symbols.dim(call.args[0].shape[0]), symbols.dim(call.args[3].shape[0])
        lengths, starts = buffers["seq_lens"], buffers["q_indptr"]
        keys, values = (Side(simd, buffers["kv_pages"], layout, keys=keys) for keys in (True, False))
        flash = Flash(simd, heads, scores, buffers["q"], keys, values, buffers["block_table"], buffers.get("sinks"))

        def extend(t: Expr, tasks: Expr) -> None:
            # Later rows see more positions. Each thread takes a run of tasks, so front and back are dealt in turn.
            half = tirx.floordiv(t, 2)
            dealt = bind(tirx.Select(tirx.floormod(t, 2).equal(i64(0)), half, tasks - 1 - half))
            head, low = bind(tirx.floormod(dealt, hk)), tirx.floordiv(dealt, hk) * block
            row, sequence = local(1, dtype="int64"), local(1, dtype="int64")
            store(row, low, 0)
            store(sequence, i64(0), 0)
            high = bind(tirx.min(low + block, n))
            with T.While(read(row, 0) < high):
                here = tirx.And(read(sequence, 0) + 1 < sequences, i64(starts[read(sequence, 0) + 1]) <= read(row, 0))
                with T.While(here):
                    store(sequence, read(sequence, 0) + 1, 0)
                s, first = bind(read(sequence, 0)), bind(read(row, 0))
                end = bind(i64(starts[s + 1]))
                stop = bind(tirx.min(high, tirx.max(end, first + 1)))
                # Rows behind the last sequence are padding: they repeat its last position rather than read past its pages.
                position = bind(tirx.min(i64(lengths[s]) - end + first, i64(lengths[s]) - 1))
                rows = bind(stop - first)
                flash.run(s, head, first, rows, position, *flash.segments(position, position + rows - 1))
                flash.states.finish(buffers["out"], head, first, rows)
                store(row, stop, 0)

        if call.phase == "decode":
            _decode(flash, hk, n, symbols.dim(call.args[2].shape[1]), lengths, buffers["out"])
        else:
            tasks = bind(ceildiv(n, block) * hk)
            with T.parallel(0, tasks) as t:
                flash.allocate()
                extend(t, tasks)
    return done()


def _decode(flash: Flash, hk: int, n: Expr, pages: Expr, lengths: Expr, out: Expr) -> None:
    """One row of each of ``n`` sequences of ``lengths`` [n] positions, which have at most ``pages`` pages."""
    most, per_row = max(1, TASKS // hk), hk * flash.heads.group  # rows that are split; queries of a row
    cached = ceildiv(pages * flash.heads.page_size, SEGMENT)
    parts = bind(tirx.Select(n <= most, cached, i64(1)))
    size = per_row * width(flash.simd, flash.heads.dv)
    found = T.alloc_buffer((tirx.min(n, i64(most)) * cached * size,), "float32")

    def of(pair: Expr) -> tuple[Expr, Expr, Expr]:
        row, head = bind(tirx.floordiv(pair, hk)), bind(tirx.floormod(pair, hk))
        return row, head, bind(i64(lengths[row]) - 1)

    with T.parallel(0, n * hk * parts) as t:
        flash.allocate()
        # Kept, so that TVM's analyses of every address do not go into a division by a variable.
        pair, part = keep(tirx.floordiv(i64(t), parts)), keep(tirx.floormod(i64(t), parts))
        row, head, position = of(pair)
        low, high = flash.segments(position, position)
        alone = parts <= 1
        begin, end = tirx.Select(alone, low, tirx.max(low, part)), tirx.Select(alone, high, tirx.min(high, part + 1))
        flash.run(row, head, row, i64(1), position, keep(begin), keep(end))
        when(
            alone,
            lambda: flash.states.finish(out, head, row, i64(1)),
            lambda: flash.states.save(found, i64(t) * flash.heads.group),
        )

    def merge() -> None:
        with T.parallel(0, n * hk) as t:
            states = flash.new_states()
            row, head, position = of(bind(i64(t)))
            low, high = flash.segments(position, position)
            states.start(i64(0), i64(1))
            with T.serial(low, high) as s:
                segment = bind(i64(s))
                states.load(found, (i64(t) * parts + segment) * flash.heads.group, states.set_of(segment, low))
                when(segment > low, lambda: states.merge(i64(1)))
            states.finish(out, head, row, i64(1))

    when(parts > 1, merge)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import attend_reference

    attrs = {name: value for name, value in call.attrs if name != "sinks"}
    return attend_reference(*arrays, **attrs)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """``context``: the positions that each of the b sequences holds; all of them are read once and multiplied by every row."""
    n, hq, d = call.args[0].bind(symbols)
    dv = int(call.attr("v_dim"))
    values = d + dv
    cache = symbols["b"] * symbols["context"] * int(call.args[1].shape[1]) * slot_bytes(call, call.args[1], d, dv)
    return cache + 4 * n * hq * values, 2 * n * hq * values * symbols["context"]
