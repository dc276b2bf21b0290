"""``llmc.quantized_linear`` for a few rows on any GPU from sm_80 on: decode, where reading the weights is all the time.

As :mod:`.gemv`: the weights are the A operand of the tensor cores (16 outputs x k), x is the B operand (k x 8 rows), the warps of
a thread block split k, and each has the loads of its whole next step in flight. Weights lie in the layout :mod:`.layout_mma`; a
lane's 16 bytes of them become A fragments in registers (:mod:`.quantized_codes`). Products of codes and x are summed in float32
over a group of k, exactly as the codes say; only then come the group's scale and offset, which multiplies the group's sum of x,
from a multiplication with ones. A scale for a whole row comes after all sums.

The order of additions behind an output element does not depend on n.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import gemv, gemv_finish, hopper, linear_call, quantized_codes
from llmc.schedules.cuda.gemm_hopper import MULTIPROCESSORS
from llmc.schedules.cuda.input_norm import InputNorm, plain
from llmc.schedules.cuda.math import ACTIVATIONS
from llmc.schedules.gpu import layout_mma, quantized_call
from llmc.schedules.gpu.emit import WIDTH
from llmc.schedules.gpu.layout_mma import BLOCK, LANES, UNIT
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.quantized_gemv"
OP = quantized_call.OP
LOAD_CODES = gemv.LOAD_WEIGHT
LOAD_X = gemv.LOAD_X
LOAD_WORDS = {1: "ld.global.nc.b32", 2: "ld.global.nc.v2.b32", 4: "ld.global.nc.v4.b32"}

SHAPES: dict[str, KernelCall] = {
    "up_14336x4096_int4_g128": make(14336, 4096, "int4_g128"),
    "square_4096_int4_g128": make(4096, 4096, "int4_g128"),
    "down_4096x14336_int4_g128_residual": make(4096, 14336, "int4_g128", residual=1),
    "up_14336x4096_int8": make(14336, 4096, "int8"),
    "up_14336x4096_fp8": make(14336, 4096, "fp8_e4m3"),
    "even_64x256_int4_g128": make(64, 256, "int4_g128_bf16"),
    "tail_48x1360_int4_g64_bias": make(48, 1360, "int4_g64", bias=1),
    "odd_19x72_f16_q4_0_silu": make(19, 72, "q4_0", "float16", activation="silu", bias=1, bias_dtype="float32", residual=1),
    "q4_1_33x352_gelu": make(33, 352, "q4_1", activation="gelu", residual=1),
    "zero_point_32x640_f16": make(32, 640, "int4p_g128", "float16"),
    "zero_point_g32_40x160": make(40, 160, "int4p_g32"),
    "int4_row_16x128": make(16, 128, "int4_row", activation="gelu_tanh"),
    "int3_g64_20x200": make(20, 200, "int3_g64"),
    "int8_33x336_bias": make(33, 336, "int8", bias=1),
    "int8_f16_16x136": make(16, 136, "int8", "float16", activation="relu"),
    "q8_0_24x288": make(24, 288, "q8_0"),
    "int8_zero_point_row_17x96": make(17, 96, "int8p"),
    "q5_1_f16_16x256": make(16, 256, "q5_1", "float16"),
    "fp8_48x512": make(48, 512, "fp8_e4m3", residual=1),
    "fp8_f16_17x264": make(17, 264, "fp8_e4m3_t", "float16"),
    "fp8_blocks_32x392": make(32, 392, "fp8_e4m3_b128"),
    "int4_f32_scales_16x256": make(16, 256, "int4z_g32_f32"),
    "gated_96x256_int4": make(96, 256, "int4z_g32", activation="silu_gated"),
    "gated_64x136_int8_bias": make(64, 136, "int8", "float16", activation="gelu_gated", bias=1, residual=1),
    "logits_100x64_int4": make(100, 64, "int4", out="float32"),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether the kernel does not take a call in any phase."""
    if not quantized_call.is_ours(call, target):
        return True
    x, (activation, gated) = call.args[0], linear_call.activation(call)
    others = [s for name, s in quantized_call.specs(call).items() if name in ("bias", "residual", "out")]
    if activation not in ACTIVATIONS or (gated and call.attr("o") % (2 * layout_mma.ROWS)):
        return True
    return x.dtype not in hopper.PTX_TYPE or call.attr("k") % UNIT != 0 or any(s.dtype not in WIDTH for s in others)


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or mismatch(call, target):
        return None
    return f"{call.attr('scheme')} codes to {call.args[0].dtype} tensor cores, exact float32 sums of a group, k split over warps"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``warps`` that split k, ``tiles`` of 16 results, ``depth`` (blocks of 128 of k in flight), ``columns`` (rows of x at once).

    ``min_blocks`` per multiprocessor limits registers (0: the compiler's choice); ``dependent_launch``: start early, on sm_90a.
    """
    warps, tiles, depth = default(call, 8)
    return {
        "warps": _first(warps, [4, 8, 16, 2, 1]), "tiles": _first(tiles, [1, 2, 4]), "depth": _first(depth, [1, 2, 4]),
        "columns": [8, 16, 32], "min_blocks": [0, 2, 3], "dependent_launch": [True, False] if hopper.is_hopper(target) else [False],
    }  # fmt: skip


def default(call: KernelCall, columns: int) -> tuple[int, int, int]:
    """``warps``, ``tiles`` and ``depth`` for up to 8 or up to 16 rows, measured on an H200 at an 8B and a 1B model's shapes.

    Few tiles want all of k in flight at once, on as many warps; of many, small blocks take turns more evenly. Codes of 8 bits
    are waited for, codes of 4 bits computed with: they want warps to switch between rather than loads in flight.
    """
    at = layout_mma.geometry(quantized_call.how(call), call.attr("o"), call.attr("k"))
    per_multiprocessor = at.tiles / MULTIPROCESSORS
    if columns > 8:
        warps, tiles, depth = (16, 2, 1) if per_multiprocessor <= 3 else (4, 2, 1)
    elif per_multiprocessor <= 2:
        warps, tiles, depth = 16, 1, 1
    elif per_multiprocessor <= 3 or at.bits == 8:
        warps, tiles, depth = 4, 1, 4
    else:
        warps, tiles, depth = 8, 1 if at.blocks > 16 else 2, 1
    if linear_call.activation(call)[1]:
        tiles = 1
    while depth > 1 and depth > at.blocks:
        depth //= 2
    while warps > 1 and depth * (warps // 2) >= at.blocks:
        warps //= 2
    return warps, tiles, depth


def _first(value: int, values: list[int]) -> list[int]:
    return [value, *(v for v in values if v != value)]


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """Also of a call with a norm before it, whose linear is one of the family's (:mod:`.input_norm`)."""
    whole, call = call, plain(call)
    how = quantized_call.how(call)
    o, k = int(call.attr("o")), int(call.attr("k"))
    at = layout_mma.geometry(how, o, k)
    specs = quantized_call.specs(call)
    dtype, out_dtype, bias_dtype, residual_dtype = linear_call.types(specs)
    scale_dtype = how.scale_dtype

    warps, depth, tiles, min_blocks = (int(config[axis]) for axis in ("warps", "depth", "tiles", "min_blocks"))
    column_tiles, dependent_launch = int(config["columns"]) // 8, bool(config["dependent_launch"])
    # A gated linear's block has a tile of the gate and, next to it, the one of the other factor.
    sides = 1 + linear_call.activation(call)[1]
    result_tiles, slots = at.tiles // sides, tiles * sides
    columns, step, threads = 8 * column_tiles, BLOCK * depth, 32 * warps
    chunk, blocks, groups, row_wise = at.chunk, at.blocks, BLOCK // (at.group or BLOCK), at.group == 0
    chunks_of_block, pieces = BLOCK // chunk, chunk // 32
    loads = depth * chunks_of_block
    """Chunks of a tile in flight."""
    whole_k, whole_blocks, whole_tiles = k % step == 0, blocks % depth == 0, result_tiles % tiles == 0
    has_zeros, has_minima = how.offset == "zero_point", how.offset == "minimum"
    has_offset, half = has_zeros or has_minima, float(quantized_codes.middle(how))
    scale_words = groups * (2 if scale_dtype == "float32" else 1)
    vector = min(4, scale_words)
    scale_shape = (at.tiles * 16,) if row_wise else (at.tiles, blocks, 8, groups, 2)
    ones = quantized_codes.ONES[dtype]
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    decode = quantized_codes.decoder(how, dtype)
    results = o // sides
    norm = InputNorm(whole, slots, column_tiles, by_rows=True)
    end = gemv_finish.Finish(
        call, results, tiles, column_tiles, norm, sources=warps, threads=threads, scale_dtype=scale_dtype if row_wise else ""
    )

    def group_ends(q: Any) -> Any:
        """Whether a group's last columns are those of piece ``q`` of a block."""
        return False if row_wise else (q + 1) * 32 % at.group == 0

    def tile_of(first: Any, r: Any) -> Any:
        """Slot ``r``'s tile of the matrix; a slot beyond the last has the last one's, whose sums are not stored again."""
        inside = first + r // sides
        return (inside if whole_tiles else T.min(inside, result_tiles - 1)) + r % sides * result_tiles

    def stored_float(regs: Any, base: int, group: int, row_half: int) -> Any:
        """A scale or minimum of a block's ``group`` for row g + 8 * row_half, float32."""
        if scale_dtype == "float32":
            return T.reinterpret("float32", regs[base + group * 2 + row_half])
        return quantized_codes.as_float(regs[base + group], row_half, scale_dtype)

    @T.prim_func
    def gemv(
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
        T.device_entry()
        if min_blocks > 0:
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": min_blocks})
        column_block, output_block = T.cta_id([T.cast((n + columns - 1) // columns, "int32"), -(-result_tiles // tiles)])
        thread = T.thread_id([threads])
        partial = T.alloc_buffer((warps, slots + norm.slots, column_tiles, 32, 4), "float32", scope="shared", align=16)
        acc = T.alloc_local((slots * column_tiles * 4,), "float32")
        group_acc = T.alloc_local((slots * column_tiles * 4,), "float32")
        group_sum = T.alloc_local((column_tiles * 4,), "float32")
        w_regs = T.alloc_local((loads * slots * 4,), "uint32")
        x_regs = T.alloc_local((depth * column_tiles * 16,), "uint32")
        scale_regs = T.alloc_local((depth * slots * scale_words,), "uint32")
        minimum_regs = T.alloc_local((depth * slots * scale_words,), "uint32")
        zero_regs = T.alloc_local((depth * slots * groups * 2,), "float32")
        fragment = T.alloc_local((4,), "uint32")
        row_scales = T.alloc_local((end.sided,), end.register(scale_dtype))
        bias_regs = T.alloc_local((end.sided,), end.register(bias_dtype))
        residual_regs = T.alloc_local((end.items,), end.register(residual_dtype))
        warp: T.int32 = thread // 32
        lane: T.int32 = thread % 32
        group: T.int32 = lane // 4
        member: T.int32 = lane % 4
        first_tile: T.int32 = output_block * tiles
        first_row: T.int32 = column_block * columns
        rows: T.int32 = T.min(T.cast(n, "int32") - first_row, columns)
        block: T.int32 = warp * depth

        @T.inline
        def load_codes(u, r, start) -> None:
            """Chunk ``u`` of a step. Beyond the last tile or block some other: x is zero there, or the sum is not stored."""
            base = T.meta_var((u * slots + r) * 4)
            tile = T.meta_var(tile_of(first_tile, r))
            piece = T.meta_var(start * chunks_of_block + u)
            T.ptx[LOAD_CODES](
                w_regs[base], w_regs[base + 1], w_regs[base + 2], w_regs[base + 3],
                codes.ptr_to([tile, piece if whole_blocks else T.min(piece, at.chunks - 1), lane, 0]),
            )  # fmt: skip

        @T.inline
        def load_words(regs, source, base, tile, line, v) -> None:
            if vector == 1:
                T.ptx[LOAD_WORDS[1]](regs[base], source.ptr_to([tile, line, group, 0, 0]))
            elif vector == 2:
                T.ptx[LOAD_WORDS[2]](regs[base], regs[base + 1], source.ptr_to([tile, line, group, 0, 0]))
            else:
                T.ptx[LOAD_WORDS[4]](
                    regs[base + v * 4], regs[base + v * 4 + 1], regs[base + v * 4 + 2], regs[base + v * 4 + 3],
                    source.ptr_to([tile, line, group, v * 4 * groups // scale_words, 0]),
                )  # fmt: skip

        @T.inline
        def load_scales(b, r, start) -> None:
            """Scales and offsets of block ``b`` of a step."""
            tile = T.meta_var(tile_of(first_tile, r))
            line = T.meta_var(start + b if whole_blocks else T.min(start + b, blocks - 1))
            for v in T.unroll(scale_words // vector):
                load_words(scale_regs, scales, (b * slots + r) * scale_words, tile, line, v)
                if has_minima:
                    load_words(minimum_regs, minima, (b * slots + r) * scale_words, tile, line, v)
            if has_zeros:
                for i in T.unroll(groups * 2):
                    zero_regs[(b * slots + r) * groups * 2 + i] = T.cast(zeros[tile, line, group, i // 2, i % 2], "float32")

        @T.inline
        def load_x(b, start) -> None:
            for q in T.unroll(4):
                for c in T.unroll(column_tiles):
                    base = T.meta_var((b * column_tiles + c) * 16 + q * 4)
                    column = T.meta_var((start + b) * BLOCK + q * 32 + member * UNIT)
                    if not whole_k:
                        for i in T.unroll(4):
                            x_regs[base + i] = T.uint32(0)
                    if group + c * 8 < rows and (whole_k or column < k):
                        T.ptx[LOAD_X](
                            x_regs[base], x_regs[base + 1], x_regs[base + 2], x_regs[base + 3],
                            x.ptr_to([T.cast(first_row + group + c * 8, "int64"), column]),
                        )  # fmt: skip

        @T.inline
        def multiply(sums, s, b, starts) -> None:
            """sums[s..] = (0 if it ``starts`` else sums[s..]) + fragment times the x pair at ``b``."""
            if starts:
                T.ptx[mma](
                    sums[s], sums[s + 1], sums[s + 2], sums[s + 3], fragment[0], fragment[1], fragment[2], fragment[3],
                    x_regs[b], x_regs[b + 1], T.float32(0), T.float32(0), T.float32(0), T.float32(0),
                )  # fmt: skip
            else:
                T.ptx[mma](
                    sums[s], sums[s + 1], sums[s + 2], sums[s + 3], fragment[0], fragment[1], fragment[2], fragment[3],
                    x_regs[b], x_regs[b + 1], sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                )  # fmt: skip

        @T.inline
        def multiply_piece(b, q) -> None:
            """Columns 32 q .. 32 q + 31 of block ``b``."""
            starts = T.meta_var(q * 32 % (at.group or BLOCK) == 0)
            if has_offset:
                for i in T.unroll(4):
                    fragment[i] = T.uint32(ones)
                for p in T.unroll(2):
                    for c in T.unroll(column_tiles):
                        multiply(group_sum, c * 4, (b * column_tiles + c) * 16 + q * 4 + p * 2, starts and p == 0)
            for r in T.unroll(slots):
                for p in T.unroll(2):
                    decode(fragment, w_regs, ((b * chunks_of_block + q // pieces) * slots + r) * 4, q % pieces, p)
                    for c in T.unroll(column_tiles):
                        to = T.meta_var((r * column_tiles + c) * 4)
                        pair = T.meta_var((b * column_tiles + c) * 16 + q * 4 + p * 2)
                        if row_wise:
                            multiply(acc, to, pair, False)
                        else:
                            multiply(group_acc, to, pair, starts and p == 0)

        @T.inline
        def add_group(b, j) -> None:
            """The finished sums of group ``j`` of a block times its scale, and the offset times the sum of x."""
            for r in T.unroll(slots):
                base = T.meta_var((b * slots + r) * scale_words)
                for c in T.unroll(column_tiles):
                    for i in T.unroll(4):
                        s = T.meta_var((r * column_tiles + c) * 4 + i)
                        if has_zeros:
                            zero = T.meta_var(zero_regs[((b * slots + r) * groups + j) * 2 + i // 2])
                            group_acc[s] = group_acc[s] + (T.float32(half) - zero) * group_sum[c * 4 + i]
                        if has_minima:
                            group_acc[s] = group_acc[s] + T.float32(half) * group_sum[c * 4 + i]
                            acc[s] = acc[s] + stored_float(minimum_regs, base, j, i // 2) * group_sum[c * 4 + i]
                        acc[s] = acc[s] + stored_float(scale_regs, base, j, i // 2) * group_acc[s]

        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        for i in T.unroll(slots * column_tiles * 4):
            acc[i] = T.float32(0)
        for i in T.unroll(depth * column_tiles * 16):
            x_regs[i] = T.uint32(0)
        if block < blocks:
            for r in T.unroll(slots):
                for u in T.unroll(loads):
                    load_codes(u, r, block)
                if not row_wise:
                    for b in T.unroll(depth):
                        load_scales(b, r, block)
        end.fetch_scales(row_scales, scales, thread, first_tile * 16)
        end.fetch_bias(bias_regs, bias, thread, first_tile * 16)
        if dependent_launch:
            T.ptx.griddepcontrol.wait()
        if block < blocks:
            for b in T.unroll(depth):
                load_x(b, block)
        end.fetch_residual(residual_regs, residual, thread, first_tile * 16, first_row, rows)
        norm.sum_rows(partial, x, thread, threads, first_row, rows)
        while block < blocks:
            following: T.int32 = block + warps * depth
            for b in T.unroll(depth):
                for q in T.unroll(4):
                    multiply_piece(b, q)
                    # A chunk that is used up makes room for the next step's.
                    if q % pieces == pieces - 1 and following < blocks:
                        for r in T.unroll(slots):
                            load_codes(b * chunks_of_block + q // pieces, r, following)
                    if group_ends(q):
                        add_group(b, (q + 1) * 32 // at.group - 1)
                if following < blocks:
                    if not row_wise:
                        for r in T.unroll(slots):
                            load_scales(b, r, following)
                    load_x(b, following)
            block = following
        end.store(partial, warp, acc, lane)
        T.cuda.cta_sync()
        end.finish(partial, 0, thread, first_tile * 16, first_row, rows, row_scales, bias_regs, residual_regs, out)

    return hopper.finish(
        gemv, f"{'norm_' * norm.here}quantized_gemv_{how.name}_{o}x{k}", linear_call.absent(specs), dependent_launch
    )


reference, roofline = quantized_call.reference, quantized_call.roofline
