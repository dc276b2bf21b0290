"""``llmc.linear`` for a few rows on sm_90a, its weights streamed through shared memory by thread blocks that stay.

As :mod:`.gemv`, tensor cores multiply with the weights as the wide operand and 1 to 8 rows of x cost the same. What differs is how
the weights come: one thread block a multiprocessor takes tile after tile of 16 results, and each of its warps keeps a ring of
boxes (16 rows x 64 columns, 128-byte swizzled) in flight through the tensor memory accelerator. The ring is full before
``griddepcontrol.wait``, takes few registers, and leaves room for a second kernel: while the kernels before are still running, or
this one finishes, memory already delivers the weights of what comes next. A step's kernels hand over without a pause.

Warps split k, and a cluster of ``split`` blocks does where k is long, so that a warp's share of x stays in its registers for all
tiles. A warp of its own adds up the partial sums and finishes; over a cluster it sends them to the block that finishes the tile
(distributed shared memory).

A lane's columns in a box are 16 t .. 16 t + 15, taken in halves: the 8 lanes that a shared load serves at once then hit every bank.
The order of additions behind an output element does not depend on n.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import gemv, gemv_finish, hopper, linear_call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.ring_gemv"
OP = "llmc.linear"
MULTIPROCESSORS = gemv.MULTIPROCESSORS
BOX = hopper.ATOM
"""Columns of a box; two multiplications of 16 x 16 for each of a lane's two 16-byte loads of a row."""

ROWS = 16
X_REGISTERS = 64
"""Most registers of a lane for its share of x."""

RING_BYTES = 96 << 10
"""Of shared memory for the weights in flight: two blocks and a small kernel's fit a multiprocessor."""

LOAD_X = "ld.global.v4.b32"
LOAD_SHARED = "ld.shared.v4.b32"

_call = partial(linear_call.sample, phase="decode")

SHAPES: dict[str, KernelCall] = {
    "square_4096": _call(4096, 4096),
    "gate_up_28672x4096": _call(28672, 4096, activation="silu_gated"),
    "down_4096x14336_residual": _call(4096, 14336, residual=1),
    "even_64x512": _call(64, 512),
    "tail_48x1360_bias": _call(48, 1360, bias=1),
    "odd_19x72_f16_silu": _call(19, 72, "float16", activation="silu", bias=1, bias_dtype="float32", residual=1),
    "many_tiles_320x136_gelu": _call(320, 136, activation="gelu", residual=1),
    "logits_100x64": _call(100, 64, out="float32"),
    "gated_96x320": _call(96, 320, activation="silu_gated"),
    "gated_38x72_f16": _call(38, 72, "float16", activation="gelu_tanh_gated", bias=1, residual=1),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether the kernel does not take a call: as :func:`.gemv.mismatch`, and x is too long for a cluster's registers."""
    return gemv.mismatch(call, target) or not splits(call, 8)


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or mismatch(call, target):
        return None
    return f"{call.args[0].dtype} tensor cores with the stored weights as the wide operand, streamed through shared memory"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``warps`` of a block and blocks of a cluster (``split``) that share k; ``columns`` (rows of x); ``ring``: bytes in flight.

    ``min_blocks`` per multiprocessor limits registers; ``dependent_launch``: start early.
    """
    pairs = splits(call, 8)
    return {
        "split": [list(p) for p in pairs], "columns": [8, 16], "ring": [RING_BYTES, RING_BYTES // 2], "min_blocks": [2, 1, 3],
        "dependent_launch": [True, False],
    }  # fmt: skip


def splits(call: KernelCall, columns: int) -> list[tuple[int, int]]:
    """Pairs of warps and blocks that share k such that x fits in registers, the fewest blocks first."""
    boxes = -(-int(call.args[1].shape[1]) // BOX)
    found = [(w, s) for s in (1, 2, 4, 8) for w in (8, 4, 16) if s * w <= max(boxes, 4)]
    return [(w, s) for w, s in found if -(-(-(-boxes // s)) // w) * columns <= X_REGISTERS]


def clusters(tiles: int, split: int) -> int:
    """How many clusters of ``split`` blocks share ``tiles`` most evenly, one block a multiprocessor."""
    rounds = -(-tiles // (MULTIPROCESSORS // split))
    return -(-tiles // rounds)


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    o, k = (int(d) for d in call.args[1].shape)
    specs = dict(zip(linear_call.operand_names(call), (*call.args, call.result), strict=True))
    dtype, out_dtype = specs["x"].dtype, specs["out"].dtype
    bias_dtype = specs["bias"].dtype if "bias" in specs else dtype
    residual_dtype = specs["residual"].dtype if "residual" in specs else dtype
    sides = 1 + linear_call.activation(call)[1]
    results = o // sides

    (warps, split), min_blocks = config["split"], int(config["min_blocks"])
    column_tiles, dependent_launch = int(config["columns"]) // 8, bool(config["dependent_launch"])
    columns, threads = 8 * column_tiles, 32 * (warps + 1)
    tiles = -(-results // ROWS)
    blocks = clusters(tiles, split)
    owned = -(-tiles // (blocks * split))
    """Tiles that a block of a cluster finishes."""
    boxes = -(-k // BOX)
    share = -(-boxes // split)
    pieces = -(-share // warps)
    units = pieces * sides
    """Boxes of a warp for a tile."""
    box_bytes = ROWS * BOX * 2
    stages = max(2, min(int(config["ring"]) // (warps * box_bytes), -(-tiles // blocks) * units))
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    store = gemv_finish.storer(sides, column_tiles)
    finish = gemv_finish.finisher(
        call, results=results, sources=warps if split == 1 else split, threads=32, tiles=1, column_tiles=column_tiles,
        out_dtype=out_dtype,
    )  # fmt: skip

    def column_of(part: Any, warp: Any, piece: Any) -> Any:
        """Where box ``piece`` of a warp starts; beyond the block's share of k, beyond all of k, where zeros come for nothing."""
        box = piece * warps + warp
        return T.if_then_else(box < share, (part * share + box) * BOX, k)

    @T.prim_func
    def gemv(x_ptr: T.handle, weight_ptr: T.handle, bias_ptr: T.handle, residual_ptr: T.handle, out_ptr: T.handle) -> None:
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        weight = T.match_buffer(weight_ptr, (o, k), dtype, align=16)
        bias = T.match_buffer(bias_ptr, (o,), bias_dtype, align=4)
        residual = T.match_buffer(residual_ptr, (n, results), residual_dtype, align=4)
        out = T.match_buffer(out_ptr, (n, results), out_dtype, align=4)
        weight_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(weight_map, dtype, weight.data, columns=k, rows=o, box_rows=ROWS)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": min_blocks})
        if split > 1:
            rank = T.cta_id_in_cluster([split])  # noqa: F841
        part, block, column_block = T.cta_id([split, blocks, T.cast((n + columns - 1) // columns, "int32")])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        ring = pool.alloc((warps * stages, ROWS, BOX), dtype, align=1024)
        partial = pool.alloc((2 * warps, sides, column_tiles, 32, 4), "float32", align=16)
        gathered = pool.alloc((owned * split, sides, column_tiles, 32, 4), "float32", align=16)
        full = pool.alloc((warps * stages,), "uint64", align=8)
        ready = pool.alloc((2,), "uint64", align=8)
        free = pool.alloc((2,), "uint64", align=8)
        complete = pool.alloc((owned,), "uint64", align=8)
        pool.commit()
        acc = T.alloc_local((sides * column_tiles * 4,), "float32")
        w_regs = T.alloc_local((16,), "uint32")
        x_regs = T.alloc_local((pieces * column_tiles * 8,), "uint32")
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
            """Ask for box ``unit`` of the block's tile ``tile``."""
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([warp * stages + slot]), T.uint32(box_bytes))
            T.ptx[hopper.TMA_LOAD](
                ring.ptr_to([warp * stages + slot, 0, 0]), T.address_of(weight_map), column_of(part, warp, unit // sides),
                (block + tile * blocks) * ROWS + unit % sides * results, full.ptr_to([warp * stages + slot]),
            )  # fmt: skip

        @T.inline
        def load_x(piece) -> None:
            for c in T.unroll(column_tiles):
                for h in T.unroll(2):
                    base = T.meta_var((piece * column_tiles + c) * 8 + h * 4)
                    column = T.meta_var(column_of(part, warp, piece) + member * 16 + h * 8)
                    for i in T.unroll(4):
                        x_regs[base + i] = T.uint32(0)
                    if group + c * 8 < rows and column < k:
                        T.ptx[LOAD_X](
                            x_regs[base], x_regs[base + 1], x_regs[base + 2], x_regs[base + 3],
                            x.ptr_to([T.cast(first_row + group + c * 8, "int64"), column]),
                        )  # fmt: skip

        @T.inline
        def multiply(slot, piece, side) -> None:
            """A box times its columns of x."""
            for h in T.unroll(2):
                for r in T.unroll(2):
                    base = T.meta_var(h * 8 + r)
                    T.ptx[LOAD_SHARED](
                        w_regs[base], w_regs[base + 2], w_regs[base + 4], w_regs[base + 6],
                        ring.ptr_to([warp * stages + slot, group + r * 8, T.bitwise_xor(member * 2 + h, group) * 8]),
                    )  # fmt: skip
            for h in T.unroll(2):
                for q in T.unroll(2):
                    for c in T.unroll(column_tiles):
                        a = T.meta_var(h * 8 + q * 4)
                        b = T.meta_var((piece * column_tiles + c) * 8 + h * 4 + q * 2)
                        s = T.meta_var((side * column_tiles + c) * 4)
                        T.ptx[mma](
                            acc[s], acc[s + 1], acc[s + 2], acc[s + 3], w_regs[a], w_regs[a + 1], w_regs[a + 2], w_regs[a + 3],
                            x_regs[b], x_regs[b + 1], acc[s], acc[s + 1], acc[s + 2], acc[s + 3],
                        )  # fmt: skip

        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        if thread < warps * stages:
            T.ptx.mbarrier.init.shared.b64(full.ptr_to([thread]), T.uint32(1))
        if thread < 2:
            T.ptx.mbarrier.init.shared.b64(ready.ptr_to([thread]), T.uint32(warps))
            T.ptx.mbarrier.init.shared.b64(free.ptr_to([thread]), T.uint32(1))
        if thread < owned:
            T.ptx.mbarrier.init.shared.b64(complete.ptr_to([thread]), T.uint32(32 * split))
        T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        if split > 1:
            T.cuda.cluster_sync()
        else:
            T.cuda.cta_sync()

        if warp < warps:
            if lane == 0:
                for i in T.unroll(stages):
                    if i // units < count:
                        fill(i, i // units, i % units)
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            for p in T.unroll(pieces):
                load_x(p)
            slot: T.int32 = 0
            phase: T.int32 = 0
            tile: T.int32 = 0
            while tile < count:
                for i in T.unroll(sides * column_tiles * 4):
                    acc[i] = T.float32(0)
                for u in T.unroll(units):
                    T.cuda.mbarrier_wait(full.ptr_to([warp * stages + slot]), phase)
                    multiply(slot, u // sides, u % sides)
                    # All lanes have read the box that the next one takes the place of.
                    T.cuda.warp_sync()
                    if lane == 0 and tile + (u + stages) // units < count:
                        fill(slot, tile + (u + stages) // units, (u + stages) % units)
                    slot = slot + 1
                    if slot == stages:
                        slot = 0
                        phase = phase ^ 1
                if tile >= 2:
                    T.cuda.mbarrier_wait(free.ptr_to([tile % 2]), tile // 2 % 2 ^ 1)
                store(partial, tile % 2 * warps + warp, acc, lane)
                T.cuda.warp_sync()
                if lane == 0:
                    T.ptx.mbarrier.arrive.shared.b64(ready.ptr_to([tile % 2]), T.uint32(1))
                tile = tile + 1
        else:
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            remote = T.alloc_local((2,), "uint32")
            done: T.int32 = 0
            while done < count:
                T.cuda.mbarrier_wait(ready.ptr_to([done % 2]), done // 2 % 2)
                if split == 1:
                    finish(partial, done % 2 * warps, lane, (block + done * blocks) * ROWS, first_row, rows, bias, bias, residual, out)
                else:
                    T.ptx.mapa.shared__cluster.u32(
                        remote[1], T.cuda.cvta_generic_to_shared(complete.ptr_to([done // split])), T.cast(done % split, "uint32")
                    )
                    for s in T.unroll(sides):
                        for c in T.unroll(column_tiles):
                            for i in T.unroll(4):
                                acc[i] = T.float32(0)
                                for w in T.unroll(warps):
                                    acc[i] = acc[i] + partial[done % 2 * warps + w, s, c, lane, i]
                            T.ptx.mapa.shared__cluster.u32(
                                remote[0],
                                T.cuda.cvta_generic_to_shared(gathered.ptr_to([done // split * split + part, s, c, lane, 0])),
                                T.cast(done % split, "uint32"),
                            )  # fmt: skip
                            T.ptx["st.shared::cluster.v4.f32"](remote[0], acc[0], acc[1], acc[2], acc[3])
                    T.ptx["mbarrier.arrive.release.cluster.shared::cluster.b64"](remote[1])
                T.cuda.warp_sync()
                if lane == 0:
                    T.ptx.mbarrier.arrive.shared.b64(free.ptr_to([done % 2]), T.uint32(1))
                done = done + 1
            if split > 1:
                mine: T.int32 = part
                while mine < count:
                    T.cuda.mbarrier_wait(complete.ptr_to([mine // split]), 0)
                    T.ptx["fence.acq_rel.cluster"]()
                    finish(
                        gathered, mine // split * split, lane, (block + mine * blocks) * ROWS, first_row, rows, bias, bias, residual,
                        out,
                    )  # fmt: skip
                    mine = mine + split

    unused = [name for name in ("bias", "residual") if name not in specs]
    return hopper.finish(gemv, f"ring_gemv_{o}x{k}", unused, dependent_launch)


reference, roofline = linear_call.reference, linear_call.roofline
