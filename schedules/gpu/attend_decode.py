"""``llmc.attend`` in the decode phase on any GPU: the positions of a sequence are split over thread blocks.

A block takes the heads that share one KV head and one part of the positions (Dao et al., 2023, "Flash-Decoding"); a second
kernel puts the parts together. Parts are whole chunks, and how many chunks a part has depends on the sequence's length alone, so
a row has the same bits in every batch.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import attention_tile
from llmc.schedules.gpu.attention_tile import MASKED, Plan, Tile, first_position, make_call, normalise
from llmc.schedules.gpu.emit import (
    Symbols,
    arguments,
    bind,
    each,
    function,
    i64,
    launch,
    registers,
    store,
    store_all,
    when,
)
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.attend_decode"
OP = attention_tile.OP
MOST_ROWS = 32

SHAPES: dict[str, KernelCall] = {
    "heads_32x8_128": make_call(32, 8, 128, phase="decode"),
    "group_3_64": make_call(6, 2, 64, phase="decode"),
    "single_80_f16": make_call(2, 2, 80, page_size=32, dtype="float16", phase="decode"),
    "odd_20_12_softcap_f32": make_call(6, 2, 20, 12, page_size=3, dtype="float32", softcap=3.0, phase="decode"),
    "group_40_16_sinks": make_call(40, 1, 16, page_size=5, sinks=1, phase="decode"),
    "window_96_sinks": make_call(4, 2, 96, window=70, sinks=1, phase="decode"),
    "int8_group_3_64": make_call(6, 2, 64, kv_dtype="int8", phase="decode"),
    "chunked_32": make_call(4, 1, 32, page_size=7, chunk=19, dtype="float16", phase="decode"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or not attention_tile.takes(call, target):
        return None
    return "positions split over blocks, the heads of a KV head together"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``split``: parts of a sequence. The default gives every multiprocessor two blocks for one sequence, up to 16 parts."""
    units = target.multiprocessors if isinstance(target, GpuTarget) else 1
    blocks = int(call.args[1].shape[1])
    default = 1
    while default < 16 and default * blocks < 2 * units:
        default *= 2
    return {"split": [default, *(s for s in (1, 2, 4, 8, 16, 32) if s != default)]}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    hq, d = (int(v) for v in call.args[0].shape[1:])
    hk, dv = int(call.args[1].shape[1]), int(call.attr("v_dim"))
    shape = attention_tile.plan(call, target, min(MOST_ROWS, 1 << (hq // hk - 1).bit_length()))
    assert shape is not None
    specs = {**dict(zip(attention_tile.names(call), call.args, strict=True)), "out": call.result}
    with function(f"attend_decode_{hq}x{d}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n, split = symbols.dim(call.args[0].shape[0]), int(config["split"])
        if split > 1:
            buffers["parts"] = T.alloc_buffer((n, hq, split, dv), "float32", scope="global")
            buffers["tops"] = T.alloc_buffer((n, hq, split), "float32", scope="global")
            buffers["totals"] = T.alloc_buffer((n, hq, split), "float32", scope="global")
        _parts(call, target, shape, buffers, n, split)
        if split > 1:
            _combine(call, target, buffers, n, split)
    return done()


def _parts(call: KernelCall, target: GpuTarget, shape: Plan, buffers: dict[str, Expr], n: Expr, split: int) -> None:
    hk = int(call.args[1].shape[1])
    group = int(call.args[0].shape[1]) // hk
    tiles = -(-group // shape.rows)
    with launch(i64(hk * tiles), shape.threads, i64(split), n) as (thread, block, part, row):
        kv_head, first_pair = bind(tirx.floordiv(block, tiles)), bind(tirx.floormod(block, tiles) * shape.rows)
        position = bind(i64(buffers["seq_lens"][row]) - 1)
        low, high = _bounds(call, shape, position, part, split)
        tile = Tile(call, target, shape, buffers, thread)
        tile.query(kv_head, lambda _: row, first_pair, i64(group))
        tile.attend(row, kv_head, low, high, [(low, high)] * tile.own)
        for i in range(tile.own):
            pair = bind(first_pair + i64(tile.row(i)))
            head = bind(kv_head * group + pair)

            def write(i: int = i, head: Expr = head) -> None:
                if split == 1:
                    factor = normalise(buffers, head, tile.top[i], tile.total[i])
                    tile.each_column(i, lambda column, value: store_all(buffers["out"], [value * factor], row, head, column))
                    return
                tile.each_column(i, lambda column, value: store(buffers["parts"], value, row, head, part, column))

                def statistics() -> None:
                    store(buffers["tops"], tile.top[i], row, head, part)
                    store(buffers["totals"], tile.total[i], row, head, part)

                when(tile.lane.equal(0), statistics)

            when(pair < group, write)


def _bounds(call: KernelCall, shape: Plan, position: Expr, part: Expr, split: int) -> tuple[Expr, Expr]:
    """The first and the last position of a part; an empty part ends before it begins."""
    low = first_position(call, position)
    if split == 1:
        return low, position
    first_chunk = bind(tirx.floordiv(low, shape.keys))
    chunks = tirx.floordiv(position, shape.keys) + 1 - first_chunk
    per_part = bind(tirx.floordiv(chunks + (split - 1), split))
    begin = bind((first_chunk + part * per_part) * shape.keys)
    end = bind((first_chunk + (part + 1) * per_part) * shape.keys - 1)
    return bind(tirx.max(low, begin)), bind(tirx.min(position, end))


def _combine(call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], n: Expr, split: int) -> None:
    """out = Σ parts · exp(top - highest) / denominator, for a row and a head a block."""
    hq, dv = int(call.args[0].shape[1]), int(call.attr("v_dim"))
    threads = target.warp_size
    with launch(i64(hq), threads, n) as (thread, head, row):
        top, total = registers(1, start=MASKED), registers(1, start=0.0)
        with T.serial(0, split) as s:
            store(top, tirx.max(top[0], buffers["tops"][row, head, i64(s)]), 0)
        with T.serial(0, split) as s:
            weight = tirx.exp(buffers["tops"][row, head, i64(s)] - top[0])
            store(total, total[0] + buffers["totals"][row, head, i64(s)] * weight, 0)
        factor = normalise(buffers, head, top[0], total[0])
        sums = registers(-(-dv // threads), start=0.0)
        with T.serial(0, split) as s:
            weight = bind(tirx.exp(buffers["tops"][row, head, i64(s)] - top[0]))

            def add(column: Expr, step: int, s: Expr = s, weight: Expr = weight) -> None:
                store(sums, sums[step] + buffers["parts"][row, head, i64(s), column] * weight, step)

            each(thread, threads, dv, add)
        each(thread, threads, dv, lambda column, step: store_all(buffers["out"], [sums[step] * factor], row, head, column))


reference, roofline = attention_tile.reference, attention_tile.roofline
