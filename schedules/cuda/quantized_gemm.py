"""``llmc.quantized_linear`` over tens to thousands of rows on sm_90a: wgmma with the weights as the A operand, from registers.

The result is computed transposed: a tile has ``rows`` outputs, 64 to a warpgroup, and ``columns`` rows of x. A lane loads its 16
bytes of a chunk (:mod:`.layout_mma`) straight from memory, ``depth`` steps ahead, and turns them into A fragments: columns go to
the lanes that wgmma wants them in, which differs from the layout's order by a transposition among four lanes, codes become 16-bit
values (:mod:`.quantized_codes`), and the scale and offset of a group are applied in float32 and rounded once. In a narrow tile the
products of a group are summed first and its scale applied to the sum. A scale for a whole row comes after the sums. x comes by TMA
into 128-byte-swizzled shared memory, copied by a warp of its own. While one warpgroup's products are computed, another one makes
its next fragments.

``split`` blocks of a cluster share a tile and k, and finish it together (:mod:`.cluster_finish`). A gated linear has both sides'
tiles.

Tiles that reach over an edge of x read zeros, so n is free; k makes rows of 16 bytes. The order of additions behind an output
element does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import cluster_finish, hopper, linear_call, quantized_codes, quantized_gemv, quantized_tiles
from llmc.schedules.cuda.gemm_hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS
from llmc.schedules.cuda.quantized_tiles import K_STEP, SHARED
from llmc.schedules.gpu import layout_mma, quantized_call
from llmc.schedules.gpu.layout_mma import BLOCK, LANES
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.quantized_gemm"
OP = quantized_call.OP
WGMMA_K = 16
LOAD_CODES = "ld.global.nc.L1::no_allocate.L2::256B.v4.b32"
OPERAND_FENCE = """
__device__ __forceinline__ void operand_fence(unsigned int& r) { asm volatile("" : "+r"(r) :: "memory"); }
"""
"""Keeps the compiler from moving the making of an A fragment into the asynchronous multiplications."""

MOST_LATE = 128
"""Columns of a tile, of both sides, up to which a group's products are summed without its scale."""

SHAPES: dict[str, KernelCall] = {
    "up_14336x4096_int4_g128": make(14336, 4096, "int4_g128", phase="extend"),
    "down_4096x14336_int8_residual": make(4096, 14336, "int8", phase="extend", residual=1),
    "up_14336x4096_fp8": make(14336, 4096, "fp8_e4m3", phase="extend"),
    "small_128x256_int4_g128": make(128, 256, "int4_g128", phase="extend"),
    "edges_72x200_q4_1_bias": make(72, 200, "q4_1", phase="extend", bias=1),
    "f16_100x328_zero_point_silu": make(100, 328, "int4p_g64", "float16", "extend", activation="silu", bias=1, residual=1),
    "int8_90x264_gelu": make(90, 264, "int8", phase="extend", activation="gelu", residual=1),
    "q8_0_64x192_f16": make(64, 192, "q8_0", "float16", "extend"),
    "fp8_33x136_gelu_tanh": make(33, 136, "fp8_e4m3", phase="extend", activation="gelu_tanh", bias=1),
    "fp8_blocks_64x392": make(64, 392, "fp8_e4m3_b128", phase="extend", activation="relu"),
    "f32_scales_48x256": make(48, 256, "int4z_g32_f32", phase="extend", out="float32"),
    "gated_160x320_int4": make(160, 320, "int4_g32", phase="extend", activation="silu_gated"),
    "gated_64x256_int8_f16": make(64, 256, "int8", "float16", "extend", activation="relu_gated", bias=1),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether the kernel does not take a call in any phase."""
    if quantized_gemv.mismatch(call, target) or not hopper.is_hopper(target):
        return True
    return linear_call.activation(call)[0] not in hopper.ACTIVATIONS


def matches(call: KernelCall, target: Target) -> str | None:
    if mismatch(call, target):
        return None
    return f"{call.attr('scheme')} codes to {call.args[0].dtype} wgmma operands in registers, k split over a cluster"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``tile``: outputs, rows of x, and blocks that a multiprocessor holds at a time; ``split``: blocks that share a tile.

    ``depth``: steps of 64 of k whose codes are in flight; ``dependent_launch``: start early.
    """
    tile, split = quantized_tiles.default(call, 512)
    return {
        "tile": [*dict.fromkeys([tile, *quantized_tiles.TILES])], "split": [*dict.fromkeys([split, *quantized_tiles.SPLITS])],
        "depth": [2, 4] if linear_call.activation(call)[1] else [4, 2, 8], "dependent_launch": [True, False],
    }  # fmt: skip


def stages(columns: int, resident: int, sums_bytes: int) -> int:
    """Depth of the pipeline of x. The sums take its place, and may need no more than the block has."""
    most = SHARED // resident
    if sums_bytes > most:
        raise ValueError(f"the sums of a tile are {sums_bytes} bytes, a block has {most}")
    return max(2, min(8, most // (columns * K_STEP * 2)))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    how = quantized_call.how(call)
    o, k = int(call.attr("o")), int(call.attr("k"))
    at = layout_mma.geometry(how, o, k)
    specs = quantized_call.specs(call)
    dtype, out_dtype, bias_dtype, residual_dtype = linear_call.types(specs)
    scale_dtype = how.scale_dtype
    _, gated = linear_call.activation(call)

    rows, columns, resident = config["tile"]
    split, depth, dependent_launch = int(config["split"]), int(config["depth"]), bool(config["dependent_launch"])
    sides, warps = 1 + gated, rows // 16
    results, result_tiles = o // sides, at.tiles // sides
    sums, pitch = columns // 2, cluster_finish.pitch(rows)
    sums_bytes, x_bytes = 4 * sides * columns * pitch, columns * K_STEP * 2
    x_stages = stages(columns, resident, sums_bytes)
    # Alone on its multiprocessor, a block has a whole warpgroup copy, which gives its registers away.
    uneven = resident == 1
    threads = 32 * (warps + (4 if uneven else 1))
    # Every part of k has a multiple of ``depth`` steps. Beyond the end x is zero.
    turns = -(-at.columns // (K_STEP * depth))
    last_step = at.columns // K_STEP - 1

    row_wise, groups = at.group == 0, BLOCK // (at.group or BLOCK)
    step_groups = max(1, K_STEP // (at.group or BLOCK))
    step_chunks = K_STEP // at.chunk
    scale_words = step_groups * (2 if scale_dtype == "float32" else 1)
    load_words = f"ld.global.nc{'' if scale_words == 1 else f'.v{scale_words}'}.b32"
    has_zeros, has_minima, half = how.offset == "zero_point", how.offset == "minimum", float(quantized_codes.middle(how))
    scale_shape = (at.tiles * 16,) if row_wise else (at.tiles, at.blocks, 8, groups, 2)
    # Codes less their zero point are exact in 16 bits: with registers for the sums of a group, scales are left to those.
    late = not row_wise and not has_minima and at.group % K_STEP == 0 and sides * columns <= MOST_LATE and depth % 2 == 0
    group_steps = max(1, at.group // K_STEP)
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"wgmma.mma_async.sync.aligned.m64n{columns}k{WGMMA_K}.f32.{mma_type}.{mma_type}"
    to_pair, decode = hopper.packed_convert(dtype), quantized_codes.decoder(how, dtype)
    to_wgmma_order = quantized_codes.transposer(how)

    def stored_float(regs: Any, base: Any, group: Any, row_half: Any) -> Any:
        """A scale or minimum of a step's ``group`` for row g + 8 * row_half, float32."""
        if scale_dtype == "float32":
            return T.reinterpret("float32", regs[base + group * 2 + row_half])
        return quantized_codes.as_float(regs[base + group], row_half, scale_dtype)

    end = cluster_finish.ClusterFinish(
        call, results=results, outputs=rows, rows=columns, split=split, cluster=split, threads=threads, room=0, scaled=row_wise
    )

    @T.prim_func
    def gemm(
        x_ptr: T.handle, codes_ptr: T.handle, scales_ptr: T.handle, zeros_ptr: T.handle, minima_ptr: T.handle, bias_ptr: T.handle,
        residual_ptr: T.handle, out_ptr: T.handle,
    ) -> None:  # fmt: skip
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        codes = T.match_buffer(codes_ptr, (at.tiles, at.chunks, LANES, 4), "int32", align=16)
        scales = T.match_buffer(scales_ptr, scale_shape, scale_dtype, align=16)
        zeros = T.match_buffer(zeros_ptr, scale_shape, "uint8", align=16)
        minima = T.match_buffer(minima_ptr, scale_shape, scale_dtype, align=16)
        bias = T.match_buffer(bias_ptr, (o,), bias_dtype, align=4)
        residual = T.match_buffer(residual_ptr, (n, results), residual_dtype, align=4)
        out = T.match_buffer(out_ptr, (n, results), out_dtype, align=4)
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(x_map, dtype, x.data, columns=k, rows=n, box_rows=columns)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
        if split > 1:
            rank = T.cta_id_in_cluster([split])  # noqa: F841
        part, x_tile, row_tile = T.cta_id([split, T.cast((n + columns - 1) // columns, "int32"), -(-result_tiles // warps)])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        s_x = pool.alloc((x_stages, columns, K_STEP), dtype, align=1024)
        # The sums of the whole tile take the place of the pipeline once that is empty, but not that of its barriers: sums of 128
        # outputs of both sides need more than eight stages have.
        pool.move_base_to(0)
        s_sums = pool.alloc((sides, columns, pitch), "float32", align=1024)
        pool.move_base_to(max(x_stages * x_bytes, sums_bytes))
        full = pool.alloc((x_stages,), "uint64", align=8)
        empty = pool.alloc((x_stages,), "uint64", align=8)
        pool.commit()
        # The same in all lanes of a warp, and the compiler has to know it.
        warp: T.int32 = hopper.shuffle(thread // 32, 0)
        lane: T.int32 = thread % 32
        first_step: T.int32 = part * turns // split * depth
        steps: T.int32 = (part + 1) * turns // split * depth - first_step
        if thread == 0:
            for i in T.unroll(x_stages):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(warps // 4))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()

        if warp >= warps:
            if uneven:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](PRODUCER_REGISTERS[warps // 4])
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            if thread == 32 * warps:
                copy_step: T.int32 = 0
                copy_stage: T.int32 = 0
                copy_phase: T.int32 = 1
                while copy_step < steps:
                    T.cuda.mbarrier_wait(empty.ptr_to([copy_stage]), copy_phase)
                    T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([copy_stage]), T.uint32(x_bytes))
                    T.ptx[hopper.TMA_LOAD](
                        s_x.ptr_to([copy_stage, 0, 0]), T.address_of(x_map), (first_step + copy_step) * K_STEP, x_tile * columns,
                        full.ptr_to([copy_stage]),
                    )  # fmt: skip
                    copy_stage = copy_stage + 1
                    if copy_stage == x_stages:
                        copy_stage = 0
                        copy_phase = copy_phase ^ 1
                    copy_step = copy_step + 1
            T.cuda.cta_sync()
        else:
            if uneven:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](CONSUMER_REGISTERS[warps // 4])
            acc = T.alloc_local((sides * sums,), "float32")
            part_sums = T.alloc_local((sides * sums if late else 1,), "float32")
            group_scale = T.alloc_local((sides * 2,), "float32")
            offset = T.alloc_local((1,), "uint32")
            multiplied = T.meta_var(part_sums if late else acc)
            w_regs = T.alloc_local((depth * sides * step_chunks * 4,), "uint32")
            scale_regs = T.alloc_local((depth * sides * scale_words,), "uint32")
            minimum_regs = T.alloc_local((depth * sides * scale_words,), "uint32")
            zero_regs = T.alloc_local((depth * sides * step_groups * 2,), "float32")
            a_regs = T.alloc_local((sides * 16,), "uint32")
            words = T.alloc_local((4,), "uint32")
            fragment = T.alloc_local((4,), "uint32")
            value = T.alloc_local((2,), "float32")
            x_descriptor = T.alloc_local((1,), "uint64")
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(x_descriptor[0]), s_x.ptr_to([0, 0, 0]), 1, 64, hopper.SWIZZLE_128B)
            tile: T.int32 = T.min(row_tile * warps + warp, result_tiles - 1)

            @T.inline
            def load(i, step) -> None:
                """Codes, scales and offsets of ``step``, or of the last one, into slot ``i``."""
                near = T.meta_var(T.min(step, last_step))
                for side in T.unroll(sides):
                    for c in T.unroll(step_chunks):
                        base = T.meta_var(((i * sides + side) * step_chunks + c) * 4)
                        T.ptx[LOAD_CODES](
                            w_regs[base], w_regs[base + 1], w_regs[base + 2], w_regs[base + 3],
                            codes.ptr_to([tile + side * result_tiles, near * step_chunks + c, lane, 0]),
                        )  # fmt: skip
                    if not row_wise:
                        inside = T.meta_var(near % 2 * groups // 2 if groups > 1 else 0)
                        load_scale_words(scale_regs, scales, (i * sides + side) * scale_words, side, near, inside)
                        if has_minima:
                            load_scale_words(minimum_regs, minima, (i * sides + side) * scale_words, side, near, inside)
                        if has_zeros:
                            for j in T.unroll(step_groups * 2):
                                zero_regs[(i * sides + side) * step_groups * 2 + j] = T.cast(
                                    zeros[tile + side * result_tiles, near // 2, lane // 4, inside + j // 2, j % 2], "float32"
                                )

            @T.inline
            def load_scale_words(regs, source, base, side, step, inside) -> None:
                start = T.meta_var(source.ptr_to([tile + side * result_tiles, step // 2, lane // 4, inside, 0]))
                if scale_words == 1:
                    T.ptx[load_words](regs[base], start)
                elif scale_words == 2:
                    T.ptx[load_words](regs[base], regs[base + 1], start)
                else:
                    T.ptx[load_words](regs[base], regs[base + 1], regs[base + 2], regs[base + 3], start)

            @T.inline
            def scaled(i, side, kk, j) -> None:
                """Element pair ``j`` of a fragment times its group's scale, plus the offset, rounded once."""
                group = T.meta_var(kk * step_groups // 4)
                base = T.meta_var((i * sides + side) * scale_words)
                scale = T.meta_var(stored_float(scale_regs, base, group, j % 2))
                zero = T.meta_var(zero_regs[((i * sides + side) * step_groups + group) * 2 + j % 2])
                for e in T.unroll(2):
                    value[e] = quantized_codes.as_float(fragment[j], e, dtype)
                    if has_minima:
                        value[e] = (value[e] + T.float32(half)) * scale + stored_float(minimum_regs, base, group, j % 2)
                    elif has_zeros:
                        value[e] = (value[e] + (T.float32(half) - zero)) * scale
                    else:
                        value[e] = value[e] * scale
                T.ptx[to_pair](fragment[j], value[1], value[0])

            @T.inline
            def less_zero_point(i, side, j) -> None:
                """Element pair ``j`` of a fragment less its row's zero point: integers, so nothing is rounded."""
                zero = T.meta_var(zero_regs[(i * sides + side) * 2 + j % 2])
                T.ptx[to_pair](offset[0], T.float32(half) - zero, T.float32(half) - zero)
                T.ptx[quantized_codes.MULTIPLY_ADD[dtype]](
                    fragment[j], fragment[j], T.uint32(quantized_codes.ONES[dtype]), offset[0]
                )

            @T.inline
            def make_fragments(i) -> None:
                """The A fragments of slot ``i``'s step."""
                for side in T.unroll(sides):
                    for c in T.unroll(step_chunks):
                        for j in T.unroll(4):
                            words[j] = w_regs[((i * sides + side) * step_chunks + c) * 4 + j]
                        to_wgmma_order(words, lane)
                        for q in T.unroll(4 // step_chunks):
                            decode(fragment, words, 0, q // 2, q % 2)
                            for j in T.unroll(4):
                                if late:
                                    if has_zeros:
                                        less_zero_point(i, side, j)
                                elif not row_wise:
                                    scaled(i, side, c * (4 // step_chunks) + q, j)
                                a_regs[(side * 4 + c * (4 // step_chunks) + q) * 4 + j] = fragment[j]

            for i in T.unroll(depth):
                load(i, first_step + i)
            for i in T.unroll(sides * sums):
                acc[i] = T.float32(0)
            if dependent_launch:
                T.ptx.griddepcontrol.wait()
            step: T.int32 = 0
            stage: T.int32 = 0
            phase: T.int32 = 0
            while step < steps:
                for i in T.unroll(depth):
                    make_fragments(i)
                    for v in T.unroll(sides * 16):
                        T.cuda.func_call("operand_fence", a_regs[v], source_code=OPERAND_FENCE, return_type="void")
                    if late:
                        for side in T.unroll(sides):
                            for h in T.unroll(2):
                                group_scale[side * 2 + h] = stored_float(scale_regs, (i * sides + side) * scale_words, 0, h)
                    load(i, first_step + step + depth + i)
                    T.cuda.mbarrier_wait(full.ptr_to([stage]), phase)
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(K_STEP // WGMMA_K):
                        for side in T.unroll(sides):
                            a = T.meta_var((side * 4 + kk) * 4)
                            T.ptx[mma](
                                *[multiplied[side * sums + v] for v in range(sums)],
                                a_regs[a], a_regs[a + 1], a_regs[a + 2], a_regs[a + 3],
                                x_descriptor[0] + T.cast(stage * (x_bytes // 16) + kk * 2, "uint64"),
                                T.bool(not late or i % group_steps > 0 or kk > 0), 1, 1, 0,
                            )  # fmt: skip
                    T.ptx.wgmma.commit_group.sync.aligned()
                    # With fragments made while a multiplication is under way, the compiler would wait after each one.
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    if late and (i + 1) % group_steps == 0:
                        hopper.fence(part_sums, sides * sums)
                        for side in T.unroll(sides):
                            for v in T.unroll(sums):
                                at_sum = T.meta_var(side * sums + v)
                                acc[at_sum] = acc[at_sum] + part_sums[at_sum] * group_scale[side * 2 + v // 2 % 2]
                    if thread % 128 == 0:
                        T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([stage]), T.uint32(1))
                    stage = stage + 1
                    if stage == x_stages:
                        stage = 0
                        phase = phase ^ 1
                step = step + depth
            hopper.fence(acc, sides * sums)
            # Every warpgroup has multiplied its last stage before another one's sums overwrite it. Those that copy are here too:
            # where a part of the block's warps meets, racecheck loses the order of what the others read later.
            T.cuda.cta_sync()
            for side in T.unroll(sides):
                for v in T.unroll(sums):
                    # A thread's sums: rows 2 * (lane % 4) and 1 more of x, outputs lane // 4 and 8 more of the warp's; 8 rows on.
                    s_sums[side, v // 4 * 8 + lane % 4 * 2 + v % 2, warp * 16 + lane // 4 + v // 2 % 2 * 8] = acc[side * sums + v]
        end.finish(
            s_sums, None, None, thread, part, 0, x_tile * columns, row_tile * rows, T.cast(n, "int32"), scales, bias, residual, out
        )

    return hopper.finish(gemm, f"quantized_gemm_{how.name}_{o}x{k}", linear_call.absent(specs), dependent_launch)


reference, roofline = quantized_call.reference, quantized_call.roofline
