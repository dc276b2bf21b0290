"""``llmc.attend`` for many rows a sequence on any GPU: tiles of (token, head) pairs, every head size, page size, mask and dtype.

The grid has room for the most tiles that the rows and sequences of a step can make; a block finds its sequence by counting the
tiles of those before it. Rows behind the last sequence (padding) stay as they were.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.gpu import attention_tile
from llmc.schedules.gpu.attention_tile import Tile, first_position, make_call, normalise
from llmc.schedules.gpu.emit import Symbols, arguments, bind, ceildiv, function, i64, launch, registers, store, store_all, when
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import GpuTarget, Target

Expr = Any
NAME = "gpu.attend_extend"
OP = attention_tile.OP

SHAPES: dict[str, KernelCall] = {
    "heads_32x8_128": make_call(32, 8, 128),
    "group_3_64": make_call(6, 2, 64),
    "extend_80_f16": make_call(2, 2, 80, page_size=32, dtype="float16"),
    "odd_20_12_softcap_f32": make_call(6, 2, 20, 12, page_size=3, dtype="float32", softcap=3.0),
    "odd_13_sinks_window": make_call(2, 1, 13, 200, page_size=5, sinks=1, window=9),
    "fp8_13_200_softcap": make_call(2, 1, 13, 200, page_size=5, dtype="float32", kv_dtype="fp8_e4m3", softcap=3.0),
    "chunked_256": make_call(2, 1, 256, page_size=7, chunk=19, dtype="float16"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase == "decode" or not attention_tile.takes(call, target):
        return None
    return "tiles of tokens and heads, keys and values through shared memory"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {"rows": [32, 16, 64]}


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols = Symbols()
    hq, d = (int(v) for v in call.args[0].shape[1:])
    hk = int(call.args[1].shape[1])
    group, shape = hq // hk, attention_tile.plan(call, target, config["rows"])
    assert shape is not None
    specs = {**dict(zip(attention_tile.names(call), call.args, strict=True)), "out": call.result}
    with function(f"attend_extend_{hq}x{d}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n, sequences = symbols.dim(call.args[0].shape[0]), symbols.dim(call.args[3].shape[0])
        with launch(ceildiv(n * group, shape.rows) + sequences, shape.threads, i64(hk)) as (thread, block, kv_head):
            sequence, tile_index, begin, count = _place(buffers, block, sequences, group, shape.rows)
            pairs, first_pair = bind(count * group), bind(tile_index * shape.rows)
            before = bind(i64(buffers["seq_lens"][sequence]) - count)

            def position(pair: Expr) -> Expr:
                return bind(before + tirx.floordiv(tirx.max(tirx.min(pair, pairs - 1), 0), group))

            tile = Tile(call, target, shape, buffers, thread)
            tile.query(kv_head, lambda pair: tirx.min(begin + tirx.floordiv(pair, group), n - 1), first_pair, pairs)
            own = [position(first_pair + i64(tile.row(i))) for i in range(tile.own)]
            seen = [(first_position(call, p), p) for p in own]
            # A block without rows goes over no positions, and stores nothing.
            low = first_position(call, position(first_pair))
            high = bind(tirx.Select(first_pair < pairs, position(first_pair + (shape.rows - 1)), i64(-1)))
            tile.attend(sequence, kv_head, bind(low), high, seen)
            for i in range(tile.own):
                pair = bind(first_pair + i64(tile.row(i)))
                head = bind(kv_head * group + tirx.floormod(pair, group))

                def write(i: int = i, pair: Expr = pair, head: Expr = head) -> None:
                    factor = normalise(buffers, head, tile.top[i], tile.total[i])
                    row = bind(begin + tirx.floordiv(pair, group))
                    tile.each_column(i, lambda column, value: store_all(buffers["out"], [value * factor], row, head, column))

                when(pair < pairs, write)
    return done()


def _place(buffers: dict[str, Expr], block: Expr, sequences: Expr, group: int, rows: int) -> tuple[Expr, Expr, Expr, Expr]:
    """A block's sequence, its tile in it, the sequence's first row, and how many rows it has (none for a spare block)."""
    starts = buffers["q_indptr"]
    found, left = registers(1, "int64"), registers(1, "int64")
    store(found, i64(0), 0)
    store(left, block, 0)

    def tiles(sequence: Expr) -> Expr:
        return ceildiv(i64(starts[sequence + 1] - starts[sequence]) * group, rows)

    with T.While(tirx.And(found[0] + 1 < sequences, left[0] >= tiles(found[0]))):
        store(left, left[0] - tiles(found[0]), 0)
        store(found, found[0] + 1, 0)
    sequence = bind(found[0])
    begin = bind(i64(starts[sequence]))
    return sequence, bind(left[0]), begin, bind(i64(starts[sequence + 1]) - begin)


reference, roofline = attention_tile.reference, attention_tile.roofline
