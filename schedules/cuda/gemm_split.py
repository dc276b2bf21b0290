"""``llmc.linear`` over tens to hundreds of rows on sm_90a: wgmma with the weights as the wide operand, k split over a cluster.

So few rows leave reading the weights most of the time, and what counts is that every multiprocessor reads all the time. A tile is
``outputs`` rows of the weight, 64 to a warpgroup, times ``rows`` of x: the result is computed transposed, and a tile need be no
higher than there are rows. ``split`` blocks of a cluster share a tile, each with a part of k, and finish it together
(:mod:`.cluster_finish`). ``share`` tiles in a cluster multiply the same rows: each of their blocks fetches a slice of x for all of
them, since from a hundred rows on x is as much to bring from the L2 cache as the weights are.

One warp copies 128-byte-swizzled tiles over mbarriers, the others multiply. Weights do not depend on the kernel before: with
programmatic dependent launch the pipeline is full of them before ``griddepcontrol.wait``.

Gated (``silu_gated``): the first half of a weight tile is rows of the gate, the second the same rows of the up projection.

Tiles that reach over an edge read zeros, so n is free; k and o only have to make rows of 16 bytes. The order of additions
behind an output element does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import cluster_finish, gemm_hopper, hopper, linear_call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.gemm_split"
OP = "llmc.linear"
K_STEP, WGMMA_K = gemm_hopper.K_STEP, gemm_hopper.WGMMA_K
SWIZZLE_ROWS = 8
"""Rows after which the pattern of a 128-byte swizzle repeats: a box of x starts at a multiple."""

SHARED = {1: 224 << 10, 2: 110 << 10}
"""Bytes of shared memory for the pipeline, by the blocks of a multiprocessor (227 KB, 1 KB of it reserved for each)."""

TILES = [
    (128, 32, 2), (128, 32, 1), (128, 64, 2), (128, 64, 1), (128, 128, 1), (128, 128, 2), (128, 256, 1), (64, 64, 2), (256, 128, 1),
]  # fmt: skip
LEAST_STEPS = 4
"""Steps of k that are worth a block of their own."""

MOST_CLUSTER = 8
MOST_ROUNDS = 4
"""Rounds of blocks over the GPU beyond which k is not split further."""

MULTIPROCESSORS = gemm_hopper.MULTIPROCESSORS

_call = linear_call.sample

SHAPES: dict[str, KernelCall] = {
    "o_4096x4096": _call(4096, 4096, residual=1),
    "qkv_6144x4096": _call(6144, 4096),
    "gate_up_28672x4096": _call(28672, 4096, activation="silu_gated"),
    "down_4096x14336": _call(4096, 14336, residual=1),
    "small_256x576": _call(256, 576),
    "edges_328x392_bias": _call(328, 392, bias=1),
    "f16_192x264_silu": _call(192, 264, "float16", activation="silu", bias=1, bias_dtype="float32"),
    "residual_136x640_gelu": _call(136, 640, activation="gelu", bias=1, residual=1),
    "gated_272x328": _call(272, 328, activation="silu_gated"),
    "gated_48x256_f16_bias": _call(48, 256, "float16", activation="gelu_tanh_gated", bias=1),
    "logits_264x256": _call(264, 256, out="float32"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if gemm_hopper.mismatch(call, target):
        return None
    return f"{call.args[0].dtype} tensor cores (wgmma), float32 sums, k split over a cluster"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``tile``: outputs and rows of a result tile, and blocks that a multiprocessor holds at a time.

    ``split``: blocks that share a tile; ``share``: tiles that share rows of x; ``dependent_launch``: start early.
    """
    tile, split, share = default(call, 64)
    return {
        "tile": [tile, *(t for t in TILES if t != tile)],
        "split": [split, *(s for s in splits(call) if s != split)],
        "share": [share, *(s for s in (1, 2, 4) if s != share)],
        "dependent_launch": [True, False],
    }


Choice = tuple[tuple[int, int, int], int, int]


def default(call: KernelCall, rows: int) -> Choice:
    """``tile``, ``split`` and ``share`` for up to ``rows`` rows, as measured on an H200 in the layers of an 8B model.

    A full GPU is not best: blocks of the next kernel that start on free multiprocessors fetch its weights meanwhile. Nor are two
    blocks to a multiprocessor: they crowd on those that are free while the kernel before still runs.
    """
    high = next((r for r in (32, 64, 128) if rows <= r), 256)
    count = -(-int(call.args[1].shape[0]) // 128) * -(-rows // high)
    fitting = [s for s in splits(call) if s * count <= MULTIPROCESSORS * 3 // 4 and s * LEAST_STEPS <= _k_steps(call)]
    split = max(fitting, default=1)
    return (128, high, 1), split, 2 if split == 1 and high > 64 and count > 1 else 1


def splits(call: KernelCall) -> list[int]:
    """What leaves every block a step of k."""
    return [s for s in (1, 2, 3, 4, 6, 8) if s <= min(_k_steps(call), MOST_CLUSTER)]


def fits(call: KernelCall, tile: tuple[int, int, int], split: int, share: int) -> bool:
    """Whether a configuration can be built, and is no more than another one with blocks that nothing is left for."""
    outputs, rows, resident = tile
    o, gated = int(call.args[1].shape[0]), linear_call.activation(call)[1]
    tiles, sides = -(-o // outputs), 1 + gated
    if split * share > MOST_CLUSTER or share > tiles or (share > 1 and rows < 64):
        return False
    if split > 1 and split * tiles > MOST_ROUNDS * MULTIPROCESSORS * resident:
        return False
    pipeline = stages(outputs, rows, resident) * (outputs + rows) * K_STEP * 2
    return 4 * sides * rows * cluster_finish.pitch(outputs // sides) <= pipeline


def _k_steps(call: KernelCall) -> int:
    return -(-int(call.args[1].shape[1]) // K_STEP)


def stages(outputs: int, rows: int, resident: int) -> int:
    """Depth of the pipeline."""
    return min(10, SHARED[resident] // ((outputs + rows) * K_STEP * 2))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    return kernel(call, config)


def kernel(call: KernelCall, config: dict[str, Any], experts: int = 0) -> Any:
    """The PrimFunc of ``call``. With ``experts``: of that many matrices ``[experts * o, k]``, grouped.

    A grouped kernel takes ``tiles [m, 3]`` int32 before the result, each an expert, the first row of x of the tile, and the end of
    the expert's rows; up to ``rows`` of them are multiplied with the expert's matrix. Unused tiles are zeros.
    """
    o, k = (int(d) for d in call.args[1].shape)
    grouped = experts > 0
    outputs, rows, resident = config["tile"]
    split, sharing, dependent_launch = int(config["split"]), int(config["share"]), bool(config["dependent_launch"])
    specs = linear_call.specs(call)
    dtype, out_dtype, bias_dtype, _ = linear_call.types(specs)
    _, gated = linear_call.activation(call)

    sides, matrix_rows = 1 + gated, o * max(experts, 1)
    results, tile_results, cluster = o // sides, outputs // sides, split * sharing
    column_tiles = -(-results // tile_results)
    groups, depth, k_steps = outputs // 64, stages(outputs, rows, resident), _k_steps(call)
    warps, pitch = 4 * groups, cluster_finish.pitch(tile_results)
    threads, sums = 32 * (warps + 1), rows // 2
    w_bytes, x_bytes = outputs * K_STEP * 2, rows * K_STEP * 2
    if split > k_steps or cluster > MOST_CLUSTER:
        raise ValueError(f"{k_steps} steps of k do not split over {split} blocks, or {split} x {sharing} blocks are no cluster")
    if 4 * sides * rows * pitch > depth * (w_bytes + x_bytes):
        raise ValueError(f"the sums of {outputs} x {rows} do not fit a pipeline of {depth} stages, whose place they take")
    mma = f"wgmma.mma_async.sync.aligned.m64n{rows}k{WGMMA_K}.f32.{hopper.PTX_TYPE[dtype]}.{hopper.PTX_TYPE[dtype]}"
    end = cluster_finish.ClusterFinish(
        call, results=results, outputs=tile_results, rows=rows, split=split, cluster=cluster, threads=threads,
        room=SHARED[resident] - depth * (w_bytes + x_bytes),
    )  # fmt: skip
    # The ranks whose blocks have part 0 of k: a slice of x goes to all of a part.
    same_part = sum(1 << member * split for member in range(sharing))

    def slice_rows(n: Any) -> Any:
        """Rows of x in one block's box: no more than there are, since a box over the edge is slow."""
        return T.min((n + (SWIZZLE_ROWS * sharing - 1)) // (SWIZZLE_ROWS * sharing) * SWIZZLE_ROWS, rows // sharing)

    @T.prim_func
    def gemm(
        x_ptr: T.handle, weight_ptr: T.handle, bias_ptr: T.handle, residual_ptr: T.handle, tiles_ptr: T.handle, out_ptr: T.handle
    ) -> None:  # fmt: skip
        n = T.int64()
        m = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        weight = T.match_buffer(weight_ptr, (matrix_rows, k), dtype, align=16)
        bias = T.match_buffer(bias_ptr, (o,), bias_dtype, align=4)
        residual = T.match_buffer(residual_ptr, (n, results), dtype, align=16)
        tiles = T.match_buffer(tiles_ptr, (m, 3), "int32", align=4)
        out = T.match_buffer(out_ptr, (n, results), out_dtype, align=16)
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(x_map, dtype, x.data, columns=k, rows=n, box_rows=T.cast(slice_rows(n), "int32"))
        weight_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(weight_map, dtype, weight.data, columns=k, rows=matrix_rows, box_rows=tile_results)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
        if cluster > 1:
            rank = T.cta_id_in_cluster([cluster])  # noqa: F841
        place, row_tile, column_group = T.cta_id(
            [cluster, T.cast(m if grouped else (n + rows - 1) // rows, "int32"), (column_tiles + sharing - 1) // sharing]
        )
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        s_x = pool.alloc((depth, rows, K_STEP), dtype, align=1024)
        s_w = pool.alloc((depth, outputs, K_STEP), dtype, align=1024)
        full = pool.alloc((depth,), "uint64", align=8)
        empty = pool.alloc((depth,), "uint64", align=8)
        received = T.meta_var(pool.alloc(end.received, "float32", align=16) if end.sent else s_x)
        # The sums of the whole tile take the place of the pipeline once that is empty.
        pool.move_base_to(0)
        s_sums = pool.alloc((sides, rows, pitch), "float32", align=1024)
        pool.commit()
        # The same in all lanes of a warp, and the compiler has to know it.
        warp: T.int32 = hopper.shuffle(thread // 32, 0)
        lane: T.int32 = thread % 32
        part: T.int32 = place % split
        member: T.int32 = place // split
        box: T.int32 = slice_rows(T.cast(n, "int32"))
        first_output: T.int32 = (column_group * sharing + member) * tile_results
        first_row: T.int32 = row_tile * rows
        end_row: T.int32 = T.cast(n, "int32")
        matrix: T.int32 = 0
        first_step: T.int32 = part * k_steps // split
        steps: T.int32 = (part + 1) * k_steps // split - first_step
        if thread == 0:
            for i in T.unroll(depth):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(groups * sharing))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        if sharing > 1:
            T.cuda.cluster_sync()
        else:
            T.cuda.cta_sync()
        added = T.meta_var(T.alloc_local((end.registers,), "uint32") if end.sent else None)
        end.arrive()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        if grouped:
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            matrix = tiles[row_tile, 0] * o
            first_row = tiles[row_tile, 1]
            end_row = tiles[row_tile, 2]
            if end_row == 0:
                steps = 0

        @T.inline
        def load_weight(stage, step) -> None:
            """Announce a stage's bytes, and copy its weights."""
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                full.ptr_to([stage]), T.cast(box * (sharing * K_STEP * 2) + w_bytes, "uint32")
            )
            for side in T.unroll(sides):
                T.ptx[hopper.TMA_LOAD](
                    s_w.ptr_to([stage, side * tile_results, 0]), T.address_of(weight_map), (first_step + step) * K_STEP,
                    matrix + first_output + side * results, full.ptr_to([stage]),
                )  # fmt: skip

        @T.inline
        def load_x(stage, step) -> None:
            if sharing > 1:
                T.ptx[hopper.TMA_LOAD + ".multicast::cluster"](
                    s_x.ptr_to([stage, member * box, 0]), T.address_of(x_map), (first_step + step) * K_STEP,
                    first_row + member * box, full.ptr_to([stage]), T.cast(same_part << part, "uint16"),
                )  # fmt: skip
            else:
                T.ptx[hopper.TMA_LOAD](
                    s_x.ptr_to([stage, 0, 0]), T.address_of(x_map), (first_step + step) * K_STEP, first_row,
                    full.ptr_to([stage]),
                )  # fmt: skip

        if warp == warps:
            if lane == 0:
                T.ptx["prefetch.tensormap"](T.address_of(x_map))
                for s in T.unroll(depth):
                    if s < steps:
                        load_weight(s, s)
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            if lane == 0:
                for s in T.unroll(depth):
                    if s < steps:
                        load_x(s, s)
                load_step: T.int32 = depth
                load_stage: T.int32 = 0
                load_phase: T.int32 = 0
                while load_step < steps:
                    T.cuda.mbarrier_wait(empty.ptr_to([load_stage]), load_phase)
                    load_weight(load_stage, load_step)
                    load_x(load_stage, load_step)
                    load_stage = load_stage + 1
                    if load_stage == depth:
                        load_stage = 0
                        load_phase = load_phase ^ 1
                    load_step = load_step + 1
            T.cuda.cta_sync()
        else:
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            acc = T.alloc_local((sums,), "float32")
            w_descriptor = T.alloc_local((1,), "uint64")
            x_descriptor = T.alloc_local((1,), "uint64")
            remote = T.alloc_local((1,), "uint32")
            group: T.int32 = warp // 4
            local: T.int32 = thread % 128
            T.cuda.wgmma.encode_matrix_descriptor(
                T.address_of(w_descriptor[0]), s_w.ptr_to([0, group * 64, 0]), 1, 64, hopper.SWIZZLE_128B
            )
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(x_descriptor[0]), s_x.ptr_to([0, 0, 0]), 1, 64, hopper.SWIZZLE_128B)

            @T.inline
            def release(s) -> None:
                """To every block that copies into it."""
                hopper.release(empty, s, sharing, local, local * split + part, remote)

            step: T.int32 = 0
            stage: T.int32 = 0
            phase: T.int32 = 0
            while step < steps:
                T.cuda.mbarrier_wait(full.ptr_to([stage]), phase)
                T.ptx.wgmma.fence.sync.aligned()
                for kk in T.unroll(K_STEP // WGMMA_K):
                    T.ptx[mma](
                        *[acc[i] for i in range(sums)],
                        w_descriptor[0] + T.cast(stage * (w_bytes // 16) + kk * 2, "uint64"),
                        x_descriptor[0] + T.cast(stage * (x_bytes // 16) + kk * 2, "uint64"),
                        (step > 0) if kk == 0 else T.bool(True), 1, 1, 0, 0,
                    )  # fmt: skip
                T.ptx.wgmma.commit_group.sync.aligned()
                # A stage handed back at once is in flight again: bytes in flight count, not the tensor cores' time.
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release(stage)
                stage = stage + 1
                if stage == depth:
                    stage = 0
                    phase = phase ^ 1
                step = step + 1
            hopper.fence(acc, sums)
            # Every warpgroup has multiplied its last stage before another one's sums overwrite it. The one that copies is here too:
            # where a part of the block's warps meets, racecheck loses the order of what the others read later.
            T.cuda.cta_sync()
            for v in T.unroll(sums):
                # A thread's sums: rows 2 * (lane % 4) and 1 more of x, outputs lane // 4 and 8 more of the warp's; 8 rows on.
                s_sums[
                    warp * 16 // tile_results, v // 4 * 8 + lane % 4 * 2 + v % 2,
                    warp * 16 % tile_results + lane // 4 + v // 2 % 2 * 8,
                ] = acc[v]  # fmt: skip
        end.finish(
            s_sums, received, added, thread, part, member * split, first_row, first_output, end_row, bias, bias, residual, out
        )  # fmt: skip

    unused = linear_call.absent(specs) + ["tiles"] * (not grouped)
    return hopper.finish(gemm, f"gemm_split_{o}x{k}", unused, dependent_launch)


reference, roofline = linear_call.reference, linear_call.roofline
