"""``llmc.quantized_linear`` for a few rows on sm_90a, its codes streamed through shared memory by thread blocks that stay.

What :mod:`.ring_gemv` is to :mod:`.gemv`: one thread block a multiprocessor takes tile after tile of 16 results, its warps split k,
each keeps a ring of boxes of codes in flight, and a warp of its own adds up and finishes. Codes of a tile lie one after the other
(:mod:`.layout_mma`), so that a box is a plain run of bytes for the copy engine and a lane's 16 bytes of a chunk meet no other
lane's bank. x is copied to shared memory whole, by the same engine, once the kernel before is done: a row is used for every tile,
and in registers a long one would not fit. Takes matrices with a scale for a row and nothing else.

The order of additions behind an output element does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import gemv, gemv_finish, hopper, linear_call, quantized_codes, quantized_gemv, ring_gemv, streaming
from llmc.schedules.cuda.input_norm import InputNorm, plain
from llmc.schedules.gpu import layout_mma, quantized_call
from llmc.schedules.gpu.layout_mma import BLOCK, LANES, UNIT
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.quantized_ring"
OP = quantized_call.OP
MULTIPROCESSORS = gemv.MULTIPROCESSORS
ROWS = layout_mma.ROWS
SHARED = 226 << 10
"""Bytes of shared memory that a block has for its ring, x and partial sums."""

X_PADDING = 32
"""Columns behind a row of x: rows next to each other are half of the banks apart."""

WORTH = (64 << 20, 256 << 20)
"""Bytes of codes between which it pays for two rows and more."""

WORTH_ALONE, WORTH_LONG = 24 << 20, 16 << 20
"""Bytes of codes from which it pays for one row, and where no block has more than a tile."""

LONG = 64
"""Blocks of 128 columns from which on boxes of two were faster; for one row they always were."""

COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
LOAD_SHARED = "ld.shared.v4.b32"

SHAPES: dict[str, KernelCall] = {
    "up_14336x4096_int8": make(14336, 4096, "int8"),
    "down_4096x14336_fp8": make(4096, 14336, "fp8_e4m3", residual=1),
    "even_64x512_int8": make(64, 512, "int8"),
    "tail_48x1360_fp8_bias": make(48, 1360, "fp8_e4m3", bias=1),
    "odd_19x72_f16_silu": make(19, 72, "int8", "float16", activation="silu", bias=1, bias_dtype="float32", residual=1),
    "int4_row_16x128": make(16, 128, "int4_row", activation="gelu_tanh"),
    "fp8_f16_17x264": make(17, 264, "fp8_e4m3_t", "float16"),
    "gated_96x640_int8": make(96, 640, "int8", activation="silu_gated"),
    "gated_64x136_int8_bias": make(64, 136, "int8", "float16", activation="gelu_gated", bias=1, residual=1),
    "logits_100x64_int8": make(100, 64, "int8", out="float32"),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether the kernel does not take a call: as :func:`.quantized_gemv.mismatch`, groups of columns, or x too long."""
    if not hopper.is_hopper(target) or quantized_gemv.mismatch(call, target):
        return True
    return most_rows(call) == 0


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or mismatch(call, target):
        return None
    return f"{call.attr('scheme')} codes to {call.args[0].dtype} tensor cores, streamed through shared memory"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``split``: warps that split k, and blocks of 128 columns of a box; ``columns``: rows of x at once; ``ring``: bytes in flight.

    ``dependent_launch``: start early.
    """
    most = most_rows(call)
    return {
        "split": [list(s) for s in splits(call, most)],
        "columns": [most, *(c for c in (1, 2, 4, 8, 16) if c != most and splits(call, c))],
        "ring": [ring_gemv.RING_BYTES],
        "dependent_launch": [True, False],
    }


def splits(call: KernelCall, columns: int) -> list[tuple[int, int]]:
    """``split`` such that ``columns`` rows of x fit in shared memory beside two boxes of each warp, the fastest first."""
    at = layout_mma.geometry(quantized_call.how(call), call.attr("o"), call.attr("k"))
    wides = [wide for wide in ((2, 1) if at.blocks >= LONG or columns == 1 else (1, 2)) if at.blocks % wide == 0]
    found = [(warps, wide) for warps in (8, 16, 4) for wide in wides if warps * wide <= max(at.blocks, 4)]
    return [split for split in found if stages(call, split, columns, ring_gemv.RING_BYTES) >= 2]


def most_rows(call: KernelCall) -> int:
    """Rows of x, up to 8, that fit; 0 if the kernel does not take the matrix."""
    how = quantized_call.how(call)
    if layout_mma.geometry(how, call.attr("o"), call.attr("k")).group:
        return 0
    return next((columns for columns in (8, 4, 2, 1) if splits(call, columns)), 0)


def pays(call: KernelCall, rows: int) -> bool:
    """Whether for so many codes the kernel was faster than :mod:`.quantized_gemv`, and takes as many rows at once."""
    at = layout_mma.geometry(quantized_call.how(call), call.attr("o"), call.attr("k"))
    alone = WORTH_LONG if at.tiles // (1 + linear_call.activation(call)[1]) <= MULTIPROCESSORS else WORTH_ALONE
    least, most = alone if rows == 1 else WORTH[0], WORTH[1]
    return most_rows(call) >= rows and least <= at.tiles * ROWS * at.columns * at.bits // 8 <= most


def stages(call: KernelCall, split: tuple[int, int], columns: int, ring: int) -> int:
    """Boxes of a warp in flight: what ``ring`` bytes hold, or the memory that x and the partial sums leave."""
    (warps, wide), sides = split, 1 + linear_call.activation(call)[1]
    at = layout_mma.geometry(quantized_call.how(call), call.attr("o"), call.attr("k"))
    x_bytes = columns * (at.columns + X_PADDING) * 2
    # One slot more, for a norm.
    partial_bytes = 2 * warps * (sides + 1) * -(-columns // 8) * LANES * 16
    return min(ring, SHARED - x_bytes - partial_bytes) // (warps * sides * wide * ROWS * BLOCK * at.bits // 8)


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """Also of a call with a norm before it, whose linear is one of the family's (:mod:`.input_norm`)."""
    whole, call = call, plain(call)
    how = quantized_call.how(call)
    o, k = int(call.attr("o")), int(call.attr("k"))
    at = layout_mma.geometry(how, o, k)
    specs = quantized_call.specs(call)
    dtype, out_dtype, bias_dtype, residual_dtype = linear_call.types(specs)
    scale_dtype = how.scale_dtype
    sides = 1 + linear_call.activation(call)[1]
    results, tiles = o // sides, at.tiles // sides

    (warps, wide), columns = config["split"], int(config["columns"])
    dependent_launch = bool(config["dependent_launch"])
    column_tiles, threads = -(-columns // 8), 32 * (warps + 1)
    blocks = -(-tiles // -(-tiles // MULTIPROCESSORS))
    depth = stages(call, (warps, wide), columns, int(config["ring"]))
    if depth < 2:
        raise ValueError(f"{columns} rows of {k} columns leave no room for two boxes of each of {warps} warps")
    chunks_of_block, pieces = BLOCK // at.chunk, at.chunk // 32
    box_chunks, boxes = wide * chunks_of_block, at.blocks // wide
    box_bytes, row_bytes = box_chunks * LANES * 16, k * 2
    padding = at.columns - k
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    lifted = quantized_codes.lifted(how, dtype)
    decode = quantized_codes.decoder(how, dtype, low=lifted)
    norm = InputNorm(whole, sides, column_tiles)
    end = gemv_finish.Finish(
        call, results, 1, column_tiles, norm, sources=warps, threads=32, scale_dtype=scale_dtype, lifted=lifted
    )
    hands = streaming.Hands(end, warps, ROWS, blocks)

    @T.prim_func
    def gemv(
        x_ptr: T.handle, codes_ptr: T.handle, scales_ptr: T.handle, bias_ptr: T.handle, residual_ptr: T.handle, out_ptr: T.handle
    ) -> None:  # fmt: skip
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        codes = T.match_buffer(codes_ptr, (at.tiles, at.chunks, LANES, 4), "int32", align=16)
        scales = T.match_buffer(scales_ptr, (at.tiles * ROWS,), scale_dtype, align=16)
        bias = T.match_buffer(bias_ptr, (o,), bias_dtype, align=4)
        residual = T.match_buffer(residual_ptr, (n, results), residual_dtype, align=4)
        out = T.match_buffer(out_ptr, (n, results), out_dtype, align=4)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        column_block, block = T.cta_id([T.cast((n + columns - 1) // columns, "int32"), blocks])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        ring = pool.alloc((warps * depth, sides, box_chunks, LANES, 4), "int32", align=128)
        s_x = pool.alloc((columns, at.columns + X_PADDING), dtype, align=128)
        partial = pool.alloc((2 * warps, sides + norm.slots, column_tiles, 32, 4), "float32", align=16)
        full = pool.alloc((warps * depth,), "uint64", align=8)
        x_full = pool.alloc((1,), "uint64", align=8)
        ready = pool.alloc((2,), "uint64", align=8)
        free = pool.alloc((2,), "uint64", align=8)
        pool.commit()
        acc = T.alloc_local(((sides + norm.slots) * column_tiles * 4,), "float32")
        w_regs = T.alloc_local((chunks_of_block * sides * 4,), "uint32")
        x_regs = T.alloc_local((4 * column_tiles * 4,), "uint32")
        fragment = T.alloc_local((4,), "uint32")
        row_scales = T.alloc_local((end.sided,), end.register(scale_dtype))
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
        mine: T.int32 = (boxes - warp + warps - 1) // warps

        @T.inline
        def fill(slot, tile, piece) -> None:
            """Ask for the warp's box ``piece`` of the block's tile ``tile``, of both sides."""
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([warp * depth + slot]), T.uint32(box_bytes * sides))
            for side in T.unroll(sides):
                T.ptx[COPY](
                    ring.ptr_to([warp * depth + slot, side, 0, 0, 0]),
                    codes.ptr_to([block + tile * blocks + side * tiles, (piece * warps + warp) * box_chunks, 0, 0]),
                    T.uint32(box_bytes), full.ptr_to([warp * depth + slot]),
                )  # fmt: skip

        @T.inline
        def load_x(first) -> None:
            """128 columns of x; rows beyond the last stay zero."""
            for q in T.unroll(4):
                for c in T.unroll(column_tiles):
                    base = T.meta_var((q * column_tiles + c) * 4)
                    if group + c * 8 < rows:
                        T.ptx[LOAD_SHARED](
                            x_regs[base], x_regs[base + 1], x_regs[base + 2], x_regs[base + 3],
                            s_x.ptr_to([group + c * 8, first + q * 32 + member * UNIT]),
                        )  # fmt: skip

        @T.inline
        def multiply(slot, b) -> None:
            """Block ``b`` of a box times its columns of x."""
            if lifted:
                quantized_codes.lift(x_regs, 16 * column_tiles)
            for u in T.unroll(chunks_of_block):
                for side in T.unroll(sides):
                    base = T.meta_var((u * sides + side) * 4)
                    T.ptx[LOAD_SHARED](
                        w_regs[base], w_regs[base + 1], w_regs[base + 2], w_regs[base + 3],
                        ring.ptr_to([warp * depth + slot, side, b * chunks_of_block + u, lane, 0]),
                    )  # fmt: skip
            for q in T.unroll(4):
                for side in T.unroll(sides):
                    for p in T.unroll(2):
                        decode(fragment, w_regs, (q // pieces * sides + side) * 4, q % pieces, p)
                        for c in T.unroll(column_tiles):
                            s = T.meta_var((side * column_tiles + c) * 4)
                            at_x = T.meta_var((q * column_tiles + c) * 4 + p * 2)
                            T.ptx[mma](
                                acc[s], acc[s + 1], acc[s + 2], acc[s + 3], fragment[0], fragment[1], fragment[2], fragment[3],
                                x_regs[at_x], x_regs[at_x + 1], acc[s], acc[s + 1], acc[s + 2], acc[s + 3],
                            )  # fmt: skip

        @T.inline
        def advance(tile, piece) -> None:
            """To the warp's next box."""
            piece = piece + 1
            if piece == mine:
                piece = 0
                tile = tile + 1

        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        streaming.start(full, ready, free, thread, warps * depth, warps)
        if thread == 0:
            T.ptx.mbarrier.init.shared.b64(x_full.ptr_to([0]), T.uint32(1))
        if padding > 0 and thread < padding:
            for r in T.unroll(columns):
                s_x[r, k + thread] = T.cast(0, dtype)
        streaming.publish()

        if warp < warps:
            next_tile: T.int32 = 0
            next_piece: T.int32 = 0
            for i in T.unroll(depth):
                if next_tile < count and mine > 0:
                    if lane == 0:
                        fill(i, next_tile, next_piece)
                    advance(next_tile, next_piece)
            for i in T.unroll(4 * column_tiles * 4):
                x_regs[i] = T.uint32(0)
            for i in T.unroll(norm.slots * column_tiles * 4):
                acc[sides * column_tiles * 4 + i] = T.float32(0)
            T.cuda.mbarrier_wait(x_full.ptr_to([0]), 0)
            piece: T.int32 = 0
            if norm.here:
                while piece < mine:
                    for b in T.unroll(wide):
                        load_x(((piece * warps + warp) * wide + b) * BLOCK)
                        for q in T.unroll(4):
                            norm.add_squares(acc, x_regs, q, 4, 0, 4)
                    piece = piece + 1
            slot: T.int32 = 0
            phase: T.int32 = 0
            tile: T.int32 = 0
            while tile < count:
                for i in T.unroll(sides * column_tiles * 4):
                    acc[i] = T.float32(0)
                piece = 0
                while piece < mine:
                    T.cuda.mbarrier_wait(full.ptr_to([warp * depth + slot]), phase)
                    for b in T.unroll(wide):
                        load_x(((piece * warps + warp) * wide + b) * BLOCK)
                        multiply(slot, b)
                    # All lanes have read the box that the next one takes the place of.
                    T.cuda.warp_sync()
                    if next_tile < count:
                        if lane == 0:
                            fill(slot, next_tile, next_piece)
                        advance(next_tile, next_piece)
                    slot = slot + 1
                    if slot == depth:
                        slot = 0
                        phase = phase ^ 1
                    piece = piece + 1
                hands.give(partial, ready, free, acc, tile, warp, lane)
                tile = tile + 1
        else:
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            if lane == 0:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(x_full.ptr_to([0]), T.cast(rows * row_bytes, "uint32"))
                row: T.int32 = 0
                while row < rows:
                    T.ptx[COPY](
                        s_x.ptr_to([row, 0]),
                        x.ptr_to([T.cast(first_row + row, "int64"), 0]),
                        T.uint32(row_bytes),
                        x_full.ptr_to([0]),
                    )
                    row = row + 1
            hands.take(
                partial, ready, free, lane, block, count, first_row, rows, scales, row_scales, bias, bias_regs, residual,
                residual_regs, out,
            )  # fmt: skip

    return hopper.finish(
        gemv, f"{'norm_' * norm.here}quantized_ring_{how.name}_{o}x{k}", linear_call.absent(specs), dependent_launch
    )


reference, roofline = quantized_call.reference, quantized_call.roofline
