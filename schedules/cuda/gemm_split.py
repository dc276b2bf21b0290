"""``llmc.linear`` over tens to hundreds of rows on sm_90a: wgmma, with k split over a cluster of thread blocks.

So few result tiles do not fill the GPU, and reading the weights is most of the time. ``split`` blocks of a cluster share a tile
``rows x columns``, each sums its part of k in float32; the sums meet in shared memory, where every block reads its share of the
tile from all of them, always in the same order (split-K in one launch: no workspace, no counters). A warpgroup copies
128-byte-swizzled tiles over mbarriers, the others multiply 64 rows each. Weights do not depend on the kernel before: with
programmatic dependent launch the pipeline is full of them before ``griddepcontrol.wait``.

Gated (``silu_gated``): the first half of a weight tile is rows of the gate, the second the same rows of the up projection, so that
a thread holds both factors of a result.

Tiles that reach over an edge read zeros, so n is free; k and o only have to make rows of 16 bytes. The order of additions
behind an output element does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import gemm_hopper, hopper, linear_call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.gemm_split"
OP = "llmc.linear"
K_STEP, WGMMA_K = gemm_hopper.K_STEP, gemm_hopper.WGMMA_K
VECTOR = 4
"""Sums that a thread reads at once from another block: 16 bytes."""

SHARED = {1: 224 << 10, 2: 110 << 10}
"""Bytes of shared memory for the pipeline, by the blocks of a multiprocessor (227 KB, 1 KB of it reserved for each)."""

TILES = [(64, 128, 1), (64, 128, 2), (64, 64, 2), (64, 256, 1), (128, 128, 1), (128, 256, 1), (128, 64, 2)]
LEAST_STEPS = 4
"""Steps of k that are worth a block of their own."""

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
    """``tile``: rows of a result tile, columns (of the weight), and blocks that a multiprocessor holds at a time.

    ``split``: blocks that share a tile; ``dependent_launch``: start early.
    """
    tile, split = default(call, 64)
    return {
        "tile": [tile, *(t for t in TILES if t != tile)],
        "split": [split, *(s for s in _splits(call) if s != split)],
        "dependent_launch": [True, False],
    }


def default(call: KernelCall, rows: int) -> tuple[tuple[int, int, int], int]:
    """``tile`` and ``split`` for up to ``rows`` rows, as measured on an H200 at the shapes of an 8B model.

    Up to 128 rows the weights' way from memory is the limit, and blocks of the next kernel that start on free multiprocessors
    hide more than more blocks of this one; from there on the multiplication is.
    """
    width = int(call.args[1].shape[0])

    def count(tile: tuple[int, int, int]) -> int:
        return -(-rows // tile[0]) * -(-width // tile[1])

    tile = (64, 128, 1) if rows <= 64 else (128, 256, 1)
    if rows > 64 and count(tile) < MULTIPROCESSORS:
        tile = (128, 128, 1)
    most = MULTIPROCESSORS if rows > 128 else MULTIPROCESSORS * 3 // 4
    fitting = [s for s in _splits(call) if s * count(tile) <= most and s * LEAST_STEPS <= _k_steps(call)]
    return tile, max(fitting, default=1)


def candidates(call: KernelCall, rows: int) -> list[tuple[tuple[int, int, int], int]]:
    """Pairs of ``tile`` and ``split`` for up to ``rows`` rows, the default first."""
    first = default(call, rows)
    high = (64,) if rows <= 64 else (64, 128)
    others = [(t, s) for t in TILES if t[0] in high for s in _splits(call)]
    return [first, *(pair for pair in others if pair != first)]


def _splits(call: KernelCall) -> list[int]:
    """What leaves every block a share of the narrowest tile's sums, and a step of k."""
    most = min(_k_steps(call), 4 if linear_call.activation(call)[1] else 8)
    return [s for s in (1, 2, 4, 8) if s <= most]


def _k_steps(call: KernelCall) -> int:
    return -(-int(call.args[1].shape[1]) // K_STEP)


def stages(rows: int, columns: int, resident: int) -> int:
    """Depth of the pipeline."""
    return min(8, SHARED[resident] // ((rows + columns) * K_STEP * 2))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    o, k = (int(d) for d in call.args[1].shape)
    rows, columns, resident = config["tile"]
    split, dependent_launch = int(config["split"]), bool(config["dependent_launch"])
    specs = dict(zip(linear_call.operand_names(call), (*call.args, call.result), strict=True))
    dtype, out_dtype = specs["x"].dtype, specs["out"].dtype
    bias_dtype = specs["bias"].dtype if "bias" in specs else dtype
    has_bias, has_residual = "bias" in specs, "residual" in specs
    activation, gated = linear_call.activation(call)

    results = o // 2 if gated else o
    box, tile_results = (columns // 2, columns // 2) if gated else (columns, columns)
    column_tiles = -(-results // tile_results)
    groups, depth, sums = rows // 64, stages(rows, columns, resident), columns // 2
    threads, k_steps = 128 * (groups + 1), _k_steps(call)
    # A block finishes ``share`` sums of every thread; gated, as many results as pairs of sums.
    halves = 2 if gated else 1
    share = sums // halves // split
    if share % VECTOR or split > k_steps:
        raise ValueError(f"tile {columns} columns wide and {k_steps} steps of k do not split over {split} blocks")
    x_bytes, w_bytes = rows * K_STEP * 2, columns * K_STEP * 2
    mma = f"wgmma.mma_async.sync.aligned.m64n{columns}k{WGMMA_K}.f32.{hopper.PTX_TYPE[dtype]}.{hopper.PTX_TYPE[dtype]}"
    to_pair, narrow = hopper.packed_convert(dtype), out_dtype == dtype

    @T.prim_func
    def gemm(x_ptr: T.handle, weight_ptr: T.handle, bias_ptr: T.handle, residual_ptr: T.handle, out_ptr: T.handle) -> None:
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        weight = T.match_buffer(weight_ptr, (o, k), dtype, align=16)
        bias = T.match_buffer(bias_ptr, (o,), bias_dtype, align=4)
        residual = T.match_buffer(residual_ptr, (n, results), dtype, align=16)
        out = T.match_buffer(out_ptr, (n, results), out_dtype, align=16)
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(x_map, dtype, x.data, columns=k, rows=n, box_rows=rows)
        weight_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(weight_map, dtype, weight.data, columns=k, rows=o, box_rows=box)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
        if split > 1:
            rank = T.cta_id_in_cluster([split])  # noqa: F841
        part, row_tile, column_tile = T.cta_id([split, T.cast((n + rows - 1) // rows, "int32"), column_tiles])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        s_x = pool.alloc((depth, rows, K_STEP), dtype, align=1024)
        s_w = pool.alloc((depth, columns, K_STEP), dtype, align=1024)
        full = pool.alloc((depth,), "uint64", align=8)
        empty = pool.alloc((depth,), "uint64", align=8)
        # The sums of the whole tile take the place of the pipeline once that is empty.
        pool.move_base_to(0)
        s_sums = pool.alloc((groups, sums // VECTOR, 128, VECTOR), "float32", align=1024)
        pool.commit()
        # The same in all lanes of a warp, and the compiler has to know it.
        warpgroup: T.int32 = hopper.shuffle(thread // 128, 0)
        row_count: T.int32 = T.cast(n, "int32")
        first_column: T.int32 = column_tile * tile_results
        first_step: T.int32 = part * k_steps // split
        steps: T.int32 = (part + 1) * k_steps // split - first_step
        if thread == 0:
            for i in T.unroll(depth):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(groups))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        acc = T.alloc_local((sums,), "float32")

        @T.inline
        def load_weight(stage, step) -> None:
            """Announce a stage's bytes, and copy its weights."""
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(x_bytes + w_bytes))
            for half in T.unroll(halves):
                T.ptx[hopper.TMA_LOAD](
                    s_w.ptr_to([stage, half * box, 0]), T.address_of(weight_map), (first_step + step) * K_STEP,
                    first_column + half * results, full.ptr_to([stage]),
                )  # fmt: skip

        @T.inline
        def load_x(stage, step) -> None:
            T.ptx[hopper.TMA_LOAD](
                s_x.ptr_to([stage, 0, 0]), T.address_of(x_map), (first_step + step) * K_STEP, row_tile * rows, full.ptr_to([stage])
            )

        if warpgroup == 0:
            if thread == 0:
                T.ptx["prefetch.tensormap"](T.address_of(x_map))
                for s in T.unroll(depth):
                    if s < steps:
                        load_weight(s, s)
                if dependent_launch:
                    T.ptx.griddepcontrol.wait()
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
            else:
                if dependent_launch:
                    T.ptx.griddepcontrol.wait()
        else:
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            x_descriptor = T.alloc_local((1,), "uint64")
            w_descriptor = T.alloc_local((1,), "uint64")
            T.cuda.wgmma.encode_matrix_descriptor(
                T.address_of(x_descriptor[0]), s_x.ptr_to([0, (warpgroup - 1) * 64, 0]), 1, 64, hopper.SWIZZLE_128B
            )
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(w_descriptor[0]), s_w.ptr_to([0, 0, 0]), 1, 64, hopper.SWIZZLE_128B)
            step: T.int32 = 0
            stage: T.int32 = 0
            phase: T.int32 = 0
            previous: T.int32 = 0
            while step < steps:
                T.cuda.mbarrier_wait(full.ptr_to([stage]), phase)
                T.ptx.wgmma.fence.sync.aligned()
                for kk in T.unroll(K_STEP // WGMMA_K):
                    T.ptx[mma](
                        *[acc[i] for i in range(sums)],
                        x_descriptor[0] + T.cast(stage * (x_bytes // 16) + kk * 2, "uint64"),
                        w_descriptor[0] + T.cast(stage * (w_bytes // 16) + kk * 2, "uint64"),
                        (step > 0) if kk == 0 else T.bool(True), 1, 1, 0, 0,
                    )  # fmt: skip
                T.ptx.wgmma.commit_group.sync.aligned()
                # The multiplication before this one is done once only one is outstanding.
                T.ptx.wgmma.wait_group.sync.aligned(1)
                if step > 0 and thread % 128 == 0:
                    T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([previous]), T.uint32(1))
                previous = stage
                stage = stage + 1
                if stage == depth:
                    stage = 0
                    phase = phase ^ 1
                step = step + 1
            T.ptx.wgmma.wait_group.sync.aligned(0)
            hopper.fence(acc, sums)

        group: T.int32 = T.max(warpgroup - 1, 0)
        local: T.int32 = thread % 128
        lane: T.int32 = thread % 32
        remote = T.alloc_local((1,), "uint32")
        fetched = T.alloc_local((split * VECTOR,), "float32")
        if split > 1:
            if groups > 1:
                # Every warpgroup has multiplied its last stage before another one's sums overwrite it.
                T.cuda.cta_sync()
            if warpgroup > 0:
                for v in T.unroll(sums // VECTOR):
                    T.ptx["st.shared.v4.f32"](
                        s_sums.ptr_to([group, v, local, 0]), acc[v * 4], acc[v * 4 + 1], acc[v * 4 + 2], acc[v * 4 + 3]
                    )
            T.cuda.cluster_sync()
            if warpgroup > 0:
                for h in T.unroll(halves):
                    for v in T.unroll(share // VECTOR):
                        for p in T.unroll(split):
                            first = T.meta_var((h * (sums // halves) + part * share) // VECTOR + v)
                            T.ptx.mapa.shared__cluster.u32(
                                remote[0], T.cuda.cvta_generic_to_shared(s_sums.ptr_to([group, first, local, 0])), T.uint32(p)
                            )
                            T.ptx["ld.shared::cluster.v4.f32"](
                                fetched[p * 4], fetched[p * 4 + 1], fetched[p * 4 + 2], fetched[p * 4 + 3], remote[0]
                            )
                        for i in T.unroll(VECTOR):
                            at = T.meta_var(h * share + v * VECTOR + i)
                            acc[at] = fetched[i]
                            for p in T.unroll(split - 1):
                                acc[at] = acc[at] + fetched[(p + 1) * VECTOR + i]
        gate = T.alloc_local((2,), "float32")
        pair = T.alloc_local((1,), "uint32")
        if warpgroup > 0:
            # Sums 2i and 2i + 1 are neighbours in a row.
            for i in T.unroll(share // 2):
                j: T.int32 = part * share + i * 2
                row: T.int32 = row_tile * rows + group * 64 + local // 32 * 16 + lane // 4 + 8 * (j // 2 % 2)
                column: T.int32 = first_column + j // 4 * 8 + lane % 4 * 2
                if row < row_count and column < results:
                    for e in T.unroll(2):
                        if has_bias:
                            acc[i * 2 + e] = acc[i * 2 + e] + T.cast(bias[column + e], "float32")
                            if gated:
                                acc[share + i * 2 + e] = acc[share + i * 2 + e] + T.cast(bias[results + column + e], "float32")
                        hopper.activate(activation, acc, i * 2 + e, gate)
                        if gated:
                            acc[i * 2 + e] = acc[i * 2 + e] * acc[share + i * 2 + e]
                    if has_residual:
                        T.ptx["ld.global.b32"](pair[0], residual.ptr_to([T.cast(row, "int64"), column]))
                        for e in T.unroll(2):
                            half = T.meta_var(T.cast(T.shift_right(pair[0], T.uint32(16 * e)), "uint16"))
                            acc[i * 2 + e] = acc[i * 2 + e] + T.cast(T.reinterpret(dtype, half), "float32")
                    if narrow:
                        T.ptx[to_pair](pair[0], acc[i * 2 + 1], acc[i * 2])
                        T.ptx["st.global.b32"](out.ptr_to([T.cast(row, "int64"), column]), pair[0])
                    else:
                        T.ptx["st.global.v2.f32"](out.ptr_to([T.cast(row, "int64"), column]), acc[i * 2], acc[i * 2 + 1])
        if split > 1:
            # No block may leave while another one still reads its shared memory.
            T.cuda.cluster_sync()

    unused = [name for name in ("bias", "residual") if name not in specs]
    return hopper.finish(gemm, f"gemm_split_{o}x{k}", unused, dependent_launch)


reference, roofline = linear_call.reference, linear_call.roofline
