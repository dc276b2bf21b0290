"""``llmc.linear`` over many rows on sm_90a: TMA, wgmma, one persistent warp-specialised kernel for every n.

Every thread block stays on its multiprocessor and works through output tiles ``rows x columns`` in an order that keeps
``TILE_GROUP`` row tiles and their weights in the L2 cache. One warpgroup of it only copies: 128-byte-swizzled tiles of x and
of the weight, ``stages`` deep, over mbarriers. The others multiply, 64 rows each, accumulate in float32 and finish:
act(. + bias) + residual (gated as in ``gemm_split``), rounded once, through shared memory to a TMA store that clips at the
edges and overlaps the next tile. In a cluster of two blocks each loads half of the weight tile for both: a third less to bring
from the L2 cache for tiles of 256 columns, and less power, of which long prompts have no more than the GPU may draw. The
design is that of CUTLASS's persistent cooperative kernel (Thakkar et al., 2023).

Tiles that reach over an edge read zeros, so n is free, k and o only have to make rows of 16 bytes. The order of additions
behind an output element does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper, linear_call
from llmc.schedules.cuda.host_choice import host_choice
from llmc.schedules.gpu.emit import WIDTH
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.gemm_hopper"
OP = "llmc.linear"
MULTIPROCESSORS = 132
"""Of an H100 SXM or H200. A GPU with fewer runs the rest of the persistent blocks in a second wave."""

TILE_GROUP = 16
K_STEP = 64
"""Columns of x and of the weight in one pipeline stage: one 128-byte swizzle atom."""

WGMMA_K = 16
PRODUCER_REGISTERS = {1: 56, 2: 40}
CONSUMER_REGISTERS = {1: 240, 2: 232}
"""By the number of consumer warpgroups. Together they stay below the 64 K registers of a multiprocessor."""

BY_ROWS = "rows"
"""The cluster of a function with several kernels: of two blocks where there is an even number of row tiles, else of one; and where
narrower tiles are done sooner, these."""

NARROW_COST = 32
"""What a result tile costs beside its columns, in columns: rows of x to copy, and the pipeline to fill and to empty."""

ROW_TILES = range(9, 33)
"""How many tiles of 128 rows a chunk of more than 1024 has, up to which narrower tiles pay: then the last round is a small part."""

ROW_BYTES = 16
"""Rows of x, weight and result are multiples of this: a tensor map's strides must be."""


_call = linear_call.sample

SHAPES: dict[str, KernelCall] = {
    "square_4096": _call(4096, 4096),
    "qkv_6144x4096": _call(6144, 4096),
    "up_14336x4096": _call(14336, 4096),
    "down_4096x14336_residual": _call(4096, 14336, residual=1),
    "small_256x192": _call(256, 192),
    "edges_328x200_bias": _call(328, 200, bias=1),
    "f16_192x72_silu": _call(192, 72, "float16", activation="silu", bias=1, bias_dtype="float32"),
    "residual_328x136_gelu": _call(328, 136, activation="gelu", bias=1, residual=1),
    "relu_64x64": _call(64, 64, activation="relu", residual=1),
    "relu2_72x320": _call(72, 320, activation="relu2"),
    "gelu_tanh_136x128": _call(136, 128, "float16", activation="gelu_tanh", residual=1),
    "logits_264x128": _call(264, 128, out="float32"),
    "gated_656x136": _call(656, 136, activation="silu_gated"),
    "gated_144x72_residual": _call(144, 72, activation="gelu_gated", bias=1, residual=1),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether wgmma and TMA do not take a call: its dtypes, or rows that are no multiple of 16 bytes."""
    if call.op != OP or not hopper.is_hopper(target) or linear_call.activation(call)[0] not in hopper.ACTIVATIONS:
        return True
    x, weight = call.args[:2]
    o, k = weight.shape if len(weight.shape) == 2 else (None, None)
    if len(x.shape) != 2 or not isinstance(o, int) or not isinstance(k, int):
        return True
    if x.dtype not in hopper.PTX_TYPE or weight.dtype != x.dtype or call.result.dtype not in (x.dtype, "float32"):
        return True
    others = dict(zip(linear_call.operand_names(call)[2:-1], call.args[2:], strict=True))
    if others.get("bias", x).dtype not in WIDTH or others.get("residual", x).dtype != x.dtype:
        return True
    lanes = ROW_BYTES // WIDTH[x.dtype]
    return bool(int(call.result.shape[1]) % lanes or k % lanes)


def matches(call: KernelCall, target: Target) -> str | None:
    if mismatch(call, target):
        return None
    return f"{call.args[0].dtype} tensor cores (wgmma), float32 sums, persistent over tiles of the result"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``tile``: rows and columns of a result tile; ``cluster``: blocks that share a weight tile, or :data:`BY_ROWS`; ``blocks``: of
    the grid.

    ``dependent_launch``: start while the kernel before this one drains.
    """
    tiles = [*dict.fromkeys(tile for tile, _ in candidates(call, None)), (64, 256), (64, 128)]
    return {"tile": tiles, "cluster": [1, 2, BY_ROWS], "blocks": [MULTIPROCESSORS], "dependent_launch": [True, False]}


def candidates(call: KernelCall, rows: int | None) -> list[tuple[tuple[int, int], int | str]]:
    """Pairs of ``tile`` and ``cluster`` for about ``rows`` rows (None: many), the default first.

    Of two tile widths the one that leaves fewer multiprocessors idle in the last round is better, and of equal ones the wider.
    """
    o = int(call.args[1].shape[0])
    widths = _widths(call)
    if rows is not None:
        row_tiles = -(-rows // 128)
        widths.sort(key=lambda width: _cost(row_tiles, o, width))
    clusters = (1, 2, BY_ROWS) if rows is None else (1, 2)
    pairs = [((128, width), cluster) for width in widths for cluster in clusters]
    # Two row tiles share a narrow weight tile's way from the L2 cache, and any if there are so many rows that power is short.
    best = 1 if o < 256 else 2 if widths[0] == 128 else BY_ROWS if rows is None else 1
    return sorted(pairs, key=lambda p: p != ((128, widths[0]), best))


def _widths(call: KernelCall) -> list[int]:
    """Columns that a result tile may have, the most first."""
    o, gated = int(call.args[1].shape[0]), linear_call.activation(call)[1]
    return [w for w in ((256, 128) if gated else (256, 192, 128)) if w <= max(o, 128)]


def _cost(row_tiles: Any, o: int, width: int) -> Any:
    """Time of all tiles, in columns. ``row_tiles``: a number, or an expression of the host."""
    return (row_tiles * -(-o // width) + (MULTIPROCESSORS - 1)) // MULTIPROCESSORS * (width + NARROW_COST)


def _sooner(row_tiles: Any, o: int, narrow: int, columns: int) -> Any:
    """Whether narrower tiles save a fortieth: they take more power."""
    return _cost(row_tiles, o, narrow) * 40 <= _cost(row_tiles, o, columns) * 39


def _narrower(call: KernelCall, columns: int) -> int | None:
    """The width below ``columns`` that saves the most over :data:`ROW_TILES`; None if none saves anything."""
    o = int(call.args[1].shape[0])

    def saved(width: int) -> int:
        sooner = [tiles for tiles in ROW_TILES if _sooner(tiles, o, width, columns)]
        return sum(_cost(tiles, o, columns) - _cost(tiles, o, width) for tiles in sooner)

    best = max((w for w in _widths(call) if w < columns), key=saved, default=columns)
    return best if best < columns and saved(best) else None


def stages(rows: int, columns: int) -> int:
    """Depth of the pipeline: what fits 227 KB beside the staging buffers of the result (16 KB per consumer warpgroup)."""
    free = (226 << 10) - rows // 64 * (16 << 10)
    return min(7, free // ((rows + columns) * K_STEP * 2))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    if config["cluster"] != BY_ROWS:
        return _kernel(call, config)
    o, (rows, columns) = int(call.args[1].shape[0]), config["tile"]
    narrow = _narrower(call, columns)
    forms = [(columns, 2), (columns, 1)] if narrow is None else [(narrow, 1), (columns, 2), (columns, 1)]
    kernels = [_kernel(call, {**config, "tile": (rows, width), "cluster": cluster}) for width, cluster in forms]
    row_tiles = (kernels[0].params[0].ty.shape[0] + (rows - 1)) // rows
    conditions = [] if narrow is None else [_sooner(row_tiles, o, narrow, columns)]
    return host_choice(kernels, [*conditions, row_tiles % 2 == 0])


def _kernel(call: KernelCall, config: dict[str, Any]) -> Any:
    o, k = (int(d) for d in call.args[1].shape)
    rows, columns = config["tile"]
    cluster, blocks, dependent_launch = int(config["cluster"]), int(config["blocks"]), bool(config["dependent_launch"])
    specs = linear_call.specs(call)
    dtype, out_dtype, bias_dtype, _ = linear_call.types(specs)
    has_bias, has_residual = "bias" in specs, "residual" in specs
    activation, gated = linear_call.activation(call)

    together = TILE_GROUP // cluster
    groups, depth = rows // 64, stages(rows, columns)
    threads, sums = 128 * (groups + 1), columns // 2
    halves = 2 if gated else 1
    results, tile_results = o // halves, columns // halves
    k_steps, column_tiles = -(-k // K_STEP), -(-results // tile_results)
    x_bytes, w_bytes = rows * K_STEP * 2, columns * K_STEP * 2
    box, chunks = columns // max(cluster, halves), tile_results // hopper.ATOM
    # Rows of the weight from one box of a tile to the next.
    apart = results if gated else box
    mma = f"wgmma.mma_async.sync.aligned.m64n{columns}k{WGMMA_K}.f32.{hopper.PTX_TYPE[dtype]}.{hopper.PTX_TYPE[dtype]}"
    producer_registers, consumer_registers = PRODUCER_REGISTERS[groups], CONSUMER_REGISTERS[groups]
    to_pair, staged = hopper.packed_convert(dtype), out_dtype == dtype

    # Which tile is the i-th: down the row tiles of a group, then to the next column of tiles, then the next group.
    def column_tile(tile: Any, row_tiles: Any) -> Any:
        inside = tile % (together * column_tiles)
        return inside // T.min(row_tiles - tile // (together * column_tiles) * together, together)

    def row_tile(tile: Any, row_tiles: Any) -> Any:
        group = tile // (together * column_tiles)
        inside = tile % (together * column_tiles)
        return group * together + inside % T.min(row_tiles - group * together, together)

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
        if staged:
            out_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            hopper.encode_tensor_map(out_map, dtype, out.data, columns=results, rows=n, box_rows=64)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        if cluster > 1:
            rank = T.cta_id_in_cluster([cluster])
        block = T.cta_id([blocks])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        s_x = pool.alloc((depth, rows, K_STEP), dtype, align=1024)
        s_w = pool.alloc((depth, columns, K_STEP), dtype, align=1024)
        s_out = pool.alloc((groups, 2, 64, hopper.ATOM), dtype, align=1024)
        full = pool.alloc((depth,), "uint64", align=8)
        empty = pool.alloc((depth,), "uint64", align=8)
        pool.commit()
        # The same in all lanes of a warp, and the compiler has to know it: register counts are set per warpgroup.
        warpgroup: T.int32 = hopper.shuffle(thread // 128, 0)
        row_count: T.int32 = T.cast(n, "int32")
        row_tiles: T.int32 = (row_count + rows * cluster - 1) // (rows * cluster)
        if thread == 0:
            for i in T.unroll(depth):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(groups * cluster))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        if cluster > 1:
            T.cuda.cluster_sync()
        else:
            T.cuda.cta_sync()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        tile: T.int32 = block // cluster
        stage: T.int32 = 0
        phase: T.int32 = 0

        if warpgroup == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](producer_registers)
            if thread == 0:
                while tile < row_tiles * column_tiles:
                    load_row: T.int32 = row_tile(tile, row_tiles) * (rows * cluster)
                    load_column: T.int32 = column_tile(tile, row_tiles) * tile_results
                    if cluster > 1:
                        load_row = load_row + rank * rows
                    load_step: T.int32 = 0
                    while load_step < k_steps:
                        T.cuda.mbarrier_wait(empty.ptr_to([stage]), phase ^ 1)
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(x_bytes + w_bytes))
                        T.ptx[hopper.TMA_LOAD](
                            s_x.ptr_to([stage, 0, 0]), T.address_of(x_map), load_step * K_STEP, load_row, full.ptr_to([stage])
                        )
                        if cluster > 1:
                            T.ptx[hopper.TMA_LOAD + ".multicast::cluster"](
                                s_w.ptr_to([stage, rank * box, 0]), T.address_of(weight_map), load_step * K_STEP,
                                load_column + rank * apart, full.ptr_to([stage]), (1 << cluster) - 1,
                            )  # fmt: skip
                        else:
                            for half in T.unroll(halves):
                                T.ptx[hopper.TMA_LOAD](
                                    s_w.ptr_to([stage, half * box, 0]), T.address_of(weight_map), load_step * K_STEP,
                                    load_column + half * apart, full.ptr_to([stage]),
                                )  # fmt: skip
                        stage = stage + 1
                        if stage == depth:
                            stage = 0
                            phase = phase ^ 1
                        load_step = load_step + 1
                    tile = tile + blocks // cluster
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
            acc = T.alloc_local((sums,), "float32")
            added = T.alloc_local((16,), "uint32")
            pair = T.alloc_local((4,), "uint32")
            gate = T.alloc_local((2,), "float32")
            x_descriptor = T.alloc_local((1,), "uint64")
            w_descriptor = T.alloc_local((1,), "uint64")
            remote = T.alloc_local((1,), "uint32")
            group: T.int32 = warpgroup - 1
            local: T.int32 = thread % 128
            lane: T.int32 = thread % 32
            warp: T.int32 = local // 32
            T.cuda.wgmma.encode_matrix_descriptor(
                T.address_of(x_descriptor[0]), s_x.ptr_to([0, group * 64, 0]), 1, 64, hopper.SWIZZLE_128B
            )
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(w_descriptor[0]), s_w.ptr_to([0, 0, 0]), 1, 64, hopper.SWIZZLE_128B)

            @T.inline
            def release(s) -> None:
                """One arrival per consumer warpgroup in every block of the cluster."""
                hopper.release(empty, s, cluster, local, local, remote)

            @T.inline
            def fetch_residual(chunk, first_row, first_column) -> None:
                """The residual under this thread's 32 sums of a chunk, two columns in a word; zero beyond the edges."""
                for i in T.unroll(16):
                    row = T.meta_var(first_row + warp * 16 + lane // 4 + 8 * (i % 2))
                    column = T.meta_var(first_column + chunk * hopper.ATOM + i // 2 * 8 + lane % 4 * 2)
                    added[i] = T.uint32(0)
                    if row < row_count and column < results:
                        T.ptx["ld.global.b32"](added[i], residual.ptr_to([T.cast(row, "int64"), column]))

            @T.inline
            def complete(chunk, first_column) -> None:
                """Bias, activation and residual; sum i of a chunk is in row 8 * (i // 2 % 2), column i // 4 * 8 + i % 2."""
                for i in T.unroll(32):
                    j = T.meta_var(chunk * 32 + i)
                    if has_bias:
                        column = T.meta_var(first_column + chunk * hopper.ATOM + i // 4 * 8 + lane % 4 * 2 + i % 2)
                        acc[j] = acc[j] + T.cast(bias[T.min(column, results - 1)], "float32")
                        if gated:
                            acc[sums // 2 + j] = acc[sums // 2 + j] + T.cast(bias[T.min(results + column, o - 1)], "float32")
                    hopper.activate(activation, acc, j, gate)
                    if gated:
                        acc[j] = acc[j] * acc[sums // 2 + j]
                    if has_residual:
                        half = T.meta_var(T.cast(T.shift_right(added[i // 2], T.uint32(16 * (i % 2))), "uint16"))
                        acc[j] = acc[j] + T.cast(T.reinterpret(dtype, half), "float32")
                    if i % 4 == 3:
                        # Work on a few sums at a time: all of a chunk in flight would not fit the registers.
                        T.cuda.func_call("register_fence", acc[j], source_code=hopper.REGISTER_FENCE, return_type="void")

            @T.inline
            def store_chunk(chunk, first_row, first_column) -> None:
                """Registers -> swizzled shared memory -> TMA. Two buffers: a chunk is written while the one before it leaves."""
                if local == 0:
                    T.ptx.cp.async_.bulk.wait_group.read(1)
                T.ptx.bar.sync(T.cast(group + 1, "uint32"), T.uint32(128))
                for q in T.unroll(4):
                    for j in T.unroll(4):
                        T.ptx[to_pair](pair[j], acc[chunk * 32 + q * 8 + j * 2 + 1], acc[chunk * 32 + q * 8 + j * 2])
                    # Lane l gives the address of row l % 8 of the 8x8 matrix l // 8; the swizzle permutes 16-byte pieces by row.
                    T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                        s_out.ptr_to([group, chunk % 2, warp * 16 + lane % 16, ((2 * q + lane // 16) ^ (lane % 8)) * 8]),
                        pair[0], pair[1], pair[2], pair[3],
                    )  # fmt: skip
                T.ptx.fence.proxy.async_.shared__cta()
                T.ptx.bar.sync(T.cast(group + 1, "uint32"), T.uint32(128))
                if local == 0:
                    T.ptx[hopper.TMA_STORE](
                        T.address_of(out_map), first_column + chunk * hopper.ATOM, first_row, s_out.ptr_to([group, chunk % 2, 0, 0])
                    )
                    T.ptx.cp.async_.bulk.commit_group()

            @T.inline
            def store_float32(chunk, first_row, first_column) -> None:
                """Two columns a thread: the four threads of a row write a whole 32-byte sector."""
                for i in T.unroll(16):
                    row = T.meta_var(first_row + warp * 16 + lane // 4 + 8 * (i % 2))
                    column = T.meta_var(first_column + chunk * hopper.ATOM + i // 2 * 8 + lane % 4 * 2)
                    if row < row_count and column < results:
                        T.ptx["st.global.v2.f32"](
                            out.ptr_to([T.cast(row, "int64"), column]), acc[chunk * 32 + i * 2], acc[chunk * 32 + i * 2 + 1]
                        )

            while tile < row_tiles * column_tiles:
                first_row: T.int32 = row_tile(tile, row_tiles) * (rows * cluster) + group * 64
                first_column: T.int32 = column_tile(tile, row_tiles) * tile_results
                if cluster > 1:
                    first_row = first_row + rank * rows
                if has_residual:
                    fetch_residual(0, first_row, first_column)
                step: T.int32 = 0
                previous: T.int32 = 0
                while step < k_steps:
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
                    if step > 0:
                        release(previous)
                    previous = stage
                    stage = stage + 1
                    if stage == depth:
                        stage = 0
                        phase = phase ^ 1
                    step = step + 1
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hopper.fence(acc, sums)
                release(previous)
                for chunk in T.unroll(chunks):
                    complete(chunk, first_column)
                    if has_residual and chunk + 1 < chunks:
                        fetch_residual(chunk + 1, first_row, first_column)
                    if staged:
                        store_chunk(chunk, first_row, first_column)
                    else:
                        store_float32(chunk, first_row, first_column)
                tile = tile + blocks // cluster
            if local == 0:
                T.ptx.cp.async_.bulk.wait_group(0)
        if cluster > 1:
            # No block may leave while its neighbour still multicasts into its shared memory or arrives at its barriers.
            T.cuda.cluster_sync()

    return hopper.finish(gemm, f"gemm_{o}x{k}", linear_call.absent(specs), dependent_launch)


reference, roofline = linear_call.reference, linear_call.roofline
