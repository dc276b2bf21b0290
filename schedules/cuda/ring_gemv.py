"""``llmc.linear`` for a few rows on sm_90a, its weights streamed through shared memory by thread blocks that stay.

As :mod:`.gemv`, tensor cores multiply with the weights as the wide operand and 1 to 8 rows of x cost the same. What differs is how
the weights come: one thread block a multiprocessor takes tile after tile of 16 results, and each of its warps keeps a ring of boxes
(16 rows by some 64 columns, 128-byte swizzled) in flight through the tensor memory accelerator. The warps split k, a warp's share
of x stays in its registers for all tiles, and a warp of its own adds up the partial sums and finishes while the others go on. The
ring fills before ``griddepcontrol.wait``.

Tiles are dealt out beforehand, so no two blocks of a kernel may share a multiprocessor: they would get one's bandwidth, and all
would wait for them (twice the time, measured). The ring is larger than half the shared memory for that reason.

On an H200, in the layers of 8B and 1B models, next to :mod:`.gemv`: 1 to 14 % faster from 32 MB of weights on, 15 % slower at 8 to
12 MB. What lost: clusters that split a long k (places for clusters of 4 or 8 run short), 176 KB in flight (15 % slower than 112),
rings small enough for two kernels to be resident, a later ``launch_dependents`` (no difference), and requests of 256 bytes to
memory (6 % slower).

The order of additions behind an output element does not depend on n.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import gemv, gemv_finish, hopper, linear_call, streaming
from llmc.schedules.cuda.input_norm import InputNorm, plain
from llmc.schedules.gpu.emit import WIDTH
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.ring_gemv"
OP = "llmc.linear"
MULTIPROCESSORS = gemv.MULTIPROCESSORS
LINE = hopper.ATOM
"""Columns in 128 bytes of a row: two 16-byte loads of each lane, and two multiplications of 16 x 16 for each of those."""

ROWS = 16
X_REGISTERS = 64
"""Most registers of a lane for its share of x."""

RING_BYTES = 128 << 10
WORTH = 32 << 20
"""Bytes of weights from which on :mod:`.gemv` was no faster: twice what the rings hold."""

LOAD_X = "ld.global.v4.b32"
LOAD_SHARED = "ld.shared.v4.b32"

_call = partial(linear_call.sample, phase="decode")

SHAPES: dict[str, KernelCall] = {
    "qkv_6144x4096": _call(6144, 4096),
    "gate_up_28672x4096": _call(28672, 4096, activation="silu_gated"),
    "logits_128256x4096": _call(128256, 4096, out="float32"),
    "even_64x512": _call(64, 512),
    "tail_48x1344_bias": _call(48, 1344, bias=1),
    "odd_19x64_f16_silu": _call(19, 64, "float16", activation="silu", bias=1, bias_dtype="float32", residual=1),
    "many_tiles_320x128_gelu": _call(320, 128, activation="gelu", residual=1),
    "logits_100x64": _call(100, 64, out="float32"),
    "gated_96x320": _call(96, 320, activation="silu_gated"),
    "gated_38x192_f16": _call(38, 192, "float16", activation="gelu_tanh_gated", bias=1, residual=1),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether the kernel does not take a call: as :func:`.gemv.mismatch`, k is no multiple of 64, or x too long for registers."""
    return gemv.mismatch(call, target) or not splits(call, 8)


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or mismatch(call, target):
        return None
    return f"{call.args[0].dtype} tensor cores with the stored weights as the wide operand, streamed through shared memory"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``split``: warps that split k, and lines of 64 columns of a box; ``columns`` (rows of x); ``ring``: bytes in flight.

    ``dependent_launch``: start early.
    """
    return {
        "split": [list(s) for s in splits(call, 8)],
        "columns": [8, 16],
        "ring": [RING_BYTES],
        "dependent_launch": [True, False],
    }


def splits(call: KernelCall, columns: int) -> list[tuple[int, int]]:
    """``split`` such that a warp's share of up to ``columns`` rows of x fits in registers, the fastest first."""
    lines, rest = divmod(int(call.args[1].shape[1]), LINE)
    if rest:
        return []
    found = [(warps, wide) for warps in (8, 16, 4) for wide in (2, 4, 1) if warps * wide <= max(lines, 4)]
    return [(warps, wide) for warps, wide in found if _share(lines, warps, wide) * wide * columns <= X_REGISTERS]


def pays(call: KernelCall) -> bool:
    """Whether the weights are so many that they make up for a block's longer start."""
    o, k = (int(d) for d in call.args[1].shape)
    return o * k * WIDTH[call.args[1].dtype] >= WORTH


def _share(lines: int, warps: int, wide: int) -> int:
    """Boxes of a row that a warp takes."""
    return -(-lines // (warps * wide))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """Also of a call with a norm before it, whose linear is one of the family's (:mod:`.input_norm`)."""
    whole, call = call, plain(call)
    o, k = (int(d) for d in call.args[1].shape)
    specs = linear_call.specs(call)
    dtype, out_dtype, bias_dtype, residual_dtype = linear_call.types(specs)
    sides = 1 + linear_call.activation(call)[1]
    results = o // sides

    (warps, wide), dependent_launch = config["split"], bool(config["dependent_launch"])
    column_tiles = int(config["columns"]) // 8
    columns, threads = 8 * column_tiles, 32 * (warps + 1)
    tiles = -(-results // ROWS)
    blocks = -(-tiles // -(-tiles // MULTIPROCESSORS))
    lines = k // LINE
    pieces = _share(lines, warps, wide)
    units = pieces * sides
    """Boxes of a warp for a tile."""
    box_bytes = ROWS * wide * LINE * 2
    stages = max(2, int(config["ring"]) // (warps * box_bytes))
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    norm = InputNorm(whole, sides, column_tiles)
    end = gemv_finish.Finish(call, results, 1, column_tiles, norm, sources=warps, threads=32)
    hands = streaming.Hands(end, warps, ROWS, blocks)

    def unit_of(member: Any, half: Any) -> Any:
        """Which 16 bytes of a line lane t takes in a half: the 8 lanes that a shared load serves at once hit all banks."""
        return member % wide + member // wide * (2 * wide) + half * wide

    @T.prim_func
    def gemv(
        x_ptr: T.handle, weight_ptr: T.handle, bias_ptr: T.handle, residual_ptr: T.handle, out_ptr: T.handle
    ) -> None:  # fmt: skip
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        weight = T.match_buffer(weight_ptr, (o, k), dtype, align=16)
        bias = T.match_buffer(bias_ptr, (o,), bias_dtype, align=4)
        residual = T.match_buffer(residual_ptr, (n, results), residual_dtype, align=4)
        out = T.match_buffer(out_ptr, (n, results), out_dtype, align=4)
        weight_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_line_map(weight_map, dtype, weight.data, columns=k, rows=o, box_lines=wide, box_rows=ROWS)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        column_block, block = T.cta_id([T.cast((n + columns - 1) // columns, "int32"), blocks])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        ring = pool.alloc((warps * stages, ROWS * wide, LINE), dtype, align=1024)
        partial = pool.alloc((2 * warps, sides + norm.slots, column_tiles, 32, 4), "float32", align=16)
        full = pool.alloc((warps * stages,), "uint64", align=8)
        ready = pool.alloc((2,), "uint64", align=8)
        free = pool.alloc((2,), "uint64", align=8)
        pool.commit()
        acc = T.alloc_local(((sides + norm.slots) * column_tiles * 4,), "float32")
        w_regs = T.alloc_local((16,), "uint32")
        x_regs = T.alloc_local((pieces * wide * column_tiles * 8,), "uint32")
        bias_regs = T.alloc_local((end.sided,), end.register(bias_dtype))
        residual_regs = T.alloc_local((end.items,), end.register(residual_dtype))
        # The same in all lanes of a warp, and the compiler has to know it.
        warp: T.int32 = hopper.shuffle(thread // 32, 0)
        lane: T.int32 = thread % 32
        group: T.int32 = lane // 4
        member: T.int32 = lane % 4
        first_row: T.int32 = column_block * columns
        rows: T.int32 = T.min(T.cast(n, "int32") - first_row, columns)
        count: T.int32 = (tiles - block + blocks - 1) // blocks

        @T.inline
        def fill(slot, tile, unit) -> None:
            """Ask for box ``unit`` of the block's tile ``tile``; beyond the last row or column zeros come for nothing."""
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([warp * stages + slot]), T.uint32(box_bytes))
            T.ptx[hopper.TMA_LOAD_3D](
                ring.ptr_to([warp * stages + slot, 0, 0]), T.address_of(weight_map), 0, (unit // sides * warps + warp) * wide,
                (block + tile * blocks) * ROWS + unit % sides * results, full.ptr_to([warp * stages + slot]),
            )  # fmt: skip

        @T.inline
        def load_x(piece) -> None:
            for line in T.unroll(wide):
                for c in T.unroll(column_tiles):
                    for h in T.unroll(2):
                        base = T.meta_var(((piece * wide + line) * column_tiles + c) * 8 + h * 4)
                        column = T.meta_var(((piece * warps + warp) * wide + line) * LINE + unit_of(member, h) * 8)
                        for i in T.unroll(4):
                            x_regs[base + i] = T.uint32(0)
                        if group + c * 8 < rows and column < k:
                            T.ptx[LOAD_X](
                                x_regs[base], x_regs[base + 1], x_regs[base + 2], x_regs[base + 3],
                                x.ptr_to([T.cast(first_row + group + c * 8, "int64"), column]),
                            )  # fmt: skip

        @T.inline
        def multiply(slot, piece, line, side) -> None:
            """A line of every row of a box times its columns of x."""
            for h in T.unroll(2):
                for r in T.unroll(2):
                    base = T.meta_var(h * 8 + r)
                    at = T.meta_var((group + r * 8) * wide + line)
                    T.ptx[LOAD_SHARED](
                        w_regs[base], w_regs[base + 2], w_regs[base + 4], w_regs[base + 6],
                        ring.ptr_to([warp * stages + slot, at, T.bitwise_xor(unit_of(member, h), at % 8) * 8]),
                    )  # fmt: skip
            for h in T.unroll(2):
                for q in T.unroll(2):
                    for c in T.unroll(column_tiles):
                        a = T.meta_var(h * 8 + q * 4)
                        b = T.meta_var(((piece * wide + line) * column_tiles + c) * 8 + h * 4 + q * 2)
                        s = T.meta_var((side * column_tiles + c) * 4)
                        T.ptx[mma](
                            acc[s], acc[s + 1], acc[s + 2], acc[s + 3], w_regs[a], w_regs[a + 1], w_regs[a + 2], w_regs[a + 3],
                            x_regs[b], x_regs[b + 1], acc[s], acc[s + 1], acc[s + 2], acc[s + 3],
                        )  # fmt: skip

        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        streaming.start(full, ready, free, thread, warps * stages, warps)
        streaming.publish()

        if warp < warps:
            if lane == 0:
                for i in T.unroll(stages):
                    if i // units < count:
                        fill(i, i // units, i % units)
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            for p in T.unroll(pieces):
                load_x(p)
            for i in T.unroll(norm.slots * column_tiles * 4):
                acc[sides * column_tiles * 4 + i] = T.float32(0)
            for i in T.unroll(pieces * wide):
                norm.add_squares(acc, x_regs, i, 8, 0, 8)
            slot: T.int32 = 0
            phase: T.int32 = 0
            tile: T.int32 = 0
            while tile < count:
                for i in T.unroll(sides * column_tiles * 4):
                    acc[i] = T.float32(0)
                for u in T.unroll(units):
                    T.cuda.mbarrier_wait(full.ptr_to([warp * stages + slot]), phase)
                    for line in T.unroll(wide):
                        multiply(slot, u // sides, line, u % sides)
                    # All lanes have read the box that the next one takes the place of.
                    T.cuda.warp_sync()
                    if lane == 0 and tile + (u + stages) // units < count:
                        fill(slot, tile + (u + stages) // units, (u + stages) % units)
                    slot = slot + 1
                    if slot == stages:
                        slot = 0
                        phase = phase ^ 1
                hands.give(partial, ready, free, acc, tile, warp, lane)
                tile = tile + 1
        else:
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            hands.take(
                partial, ready, free, lane, block, count, first_row, rows, bias, bias_regs, bias, bias_regs, residual,
                residual_regs, out,
            )  # fmt: skip

    return hopper.finish(gemv, f"{'norm_' * norm.here}ring_gemv_{o}x{k}", linear_call.absent(specs), dependent_launch)


reference, roofline = linear_call.reference, linear_call.roofline
