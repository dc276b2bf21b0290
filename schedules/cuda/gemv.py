"""``llmc.linear`` for a few rows on sm_90a: the decode phase, where reading the weights is all the time there is.

Tensor cores multiply with the weights as the A operand (16 outputs x k) and x as the B operand (k x 8 rows), so 1 to 8 rows
of x cost the same. The k order inside each block of 32 is permuted on both sides alike, so that the A fragment of a lane
is 16 consecutive bytes of a weight row as it is stored. The warps of a thread block split k; every warp has the loads of its
whole next step in flight, and refills a register as soon as it is consumed. Sums are float32 and meet in shared memory.

Weights do not depend on the kernel before: with programmatic dependent launch the first ones are on their way before
``griddepcontrol.wait``. More rows than ``columns`` are done by several blocks that read the same weights at the same
time, so that all but the first find them in the L2 cache: correct for every n. Fragment layout: PTX ISA, "mma.m16n8k16".

The order of additions behind an output element does not depend on n.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import gemv_finish, hopper, linear_call
from llmc.schedules.cuda.input_norm import InputNorm, plain
from llmc.schedules.cuda.math import ACTIVATIONS
from llmc.schedules.gpu.emit import WIDTH
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.gemv"
OP = "llmc.linear"
LANE_K = 8
"""Elements of k that a lane loads at once: 16 bytes."""

MULTIPROCESSORS = 132
"""Of an H100 SXM or H200."""

CHUNK = 32
"""Elements of k that the four lanes of a row load at once: two mma steps."""

LOAD_WEIGHT = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32"
"""A miss fetches 128 bytes. With 256 a layer of an 8B model in bfloat16 took 3 % longer on an H200, with 64 or no hint 13 %."""

LOAD_X = "ld.global.v4.b32"
"""Rows of x, as the kernel before this one left them. Not ``.nc``: ptxas moved such loads above ``griddepcontrol.wait``."""


_call = partial(linear_call.sample, phase="decode")

SHAPES: dict[str, KernelCall] = {
    "square_4096": _call(4096, 4096),
    "up_14336x4096": _call(14336, 4096),
    "down_4096x14336_residual": _call(4096, 14336, residual=1),
    "even_64x256": _call(64, 256),
    "tail_48x1360_bias": _call(48, 1360, bias=1),
    "odd_19x72_f16_silu": _call(19, 72, "float16", activation="silu", bias=1, bias_dtype="float32", residual=1),
    "gelu_33x336": _call(33, 336, activation="gelu", residual=1),
    "gelu_tanh_16x16": _call(16, 16, "float16", activation="gelu_tanh"),
    "relu_8x1040": _call(8, 1040, activation="relu", bias=1),
    "logits_100x64": _call(100, 64, out="float32"),
    "gated_48x320": _call(48, 320, activation="silu_gated"),
    "gated_38x72_f16": _call(38, 72, "float16", activation="gelu_tanh_gated", bias=1, residual=1),
}


def mismatch(call: KernelCall, target: Target) -> bool:
    """Whether the kernel does not take a call in any phase: its dtypes, or rows of the weight that are no multiple of 16 bytes."""
    if call.op != OP or not hopper.is_hopper(target) or linear_call.activation(call)[0] not in ACTIVATIONS:
        return True
    x, weight = call.args[:2]
    o, k = weight.shape if len(weight.shape) == 2 else (None, None)
    if len(x.shape) != 2 or not isinstance(o, int) or not isinstance(k, int) or k % LANE_K:
        return True
    return x.dtype not in hopper.PTX_TYPE or weight.dtype != x.dtype or any(s.dtype not in WIDTH for s in (*call.args, call.result))


def matches(call: KernelCall, target: Target) -> str | None:
    if call.phase != "decode" or mismatch(call, target):
        return None
    return f"{call.args[0].dtype} tensor cores with the stored weights as the wide operand, float32 sums, k split over warps"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``warps`` that split k, ``tiles`` of 16 weight rows, ``depth`` (blocks of 32 of k in flight), ``columns`` (rows of x).

    ``min_blocks`` per multiprocessor limits registers (0: the compiler's choice); ``dependent_launch``: start early. Fetching more
    weights to the L2 cache before the wait (``cp.async.bulk.prefetch.L2``) made an 8B model's step 5 % slower on an H200.
    """
    warps, depth = default_split(call, 8)
    return {
        "warps": _first(warps, [4, 8, 16, 2, 1]), "depth": _first(depth, [4, 8, 2, 1]), "tiles": [1, 2], "columns": [8, 16, 32],
        "min_blocks": [0, 2, 3], "dependent_launch": [True, False],
    }  # fmt: skip


def default_split(call: KernelCall, columns: int) -> tuple[int, int]:
    """``warps`` and ``depth`` for up to 8 or up to 16 rows.

    Few tiles want many loads in flight and to be resident all at once; many take turns, and small blocks do so more evenly.
    Measured on an H200 at the shapes of an 8B model.
    """
    o, k = (int(d) for d in call.args[1].shape)
    per_multiprocessor = -(-o // 16) / MULTIPROCESSORS
    busy = 0 if per_multiprocessor <= 2 else 1 if per_multiprocessor <= 3 else 2
    warps, depth = ([(8, 8), (8, 4), (4, 4)] if columns <= 8 else [(16, 2), (4, 8), (4, 4)])[busy]
    while depth > 1 and CHUNK * depth > k:
        depth //= 2
    while warps > 1 and CHUNK * depth * (warps // 2) >= k:
        warps //= 2
    return warps, depth


def _first(value: int, values: list[int]) -> list[int]:
    return [value, *(v for v in values if v != value)]


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """Also of a call with a norm before it, whose linear is one of the family's (:mod:`.input_norm`)."""
    whole, call = call, plain(call)
    o, k = (int(d) for d in call.args[1].shape)
    specs = linear_call.specs(call)
    dtype, out_dtype, bias_dtype, residual_dtype = linear_call.types(specs)
    gated = linear_call.activation(call)[1]

    warps, depth, tiles, blocks = (int(config[axis]) for axis in ("warps", "depth", "tiles", "min_blocks"))
    column_tiles = int(config["columns"]) // 8
    dependent_launch = bool(config["dependent_launch"])
    # Results of a tile of 16 weight rows, and the distance of its upper and lower 8.
    results, tile_results, apart = (o // 2, 8, o // 2) if gated else (o, 16, 8)
    outputs, columns, step, threads = tile_results * tiles, 8 * column_tiles, CHUNK * depth, 32 * warps
    whole_k, whole_o = k % step == 0, results % outputs == 0
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    norm = InputNorm(whole, tiles, column_tiles)
    end = gemv_finish.Finish(call, results, tiles, column_tiles, norm, sources=warps, threads=threads, paired=gated)

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
        T.device_entry()
        if blocks > 0:
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": blocks})
        column_block, output_block = T.cta_id([T.cast((n + columns - 1) // columns, "int32"), -(-results // outputs)])
        thread = T.thread_id([threads])
        partial = T.alloc_buffer((warps, tiles + norm.slots, column_tiles, 32, 4), "float32", scope="shared", align=16)
        acc = T.alloc_local(((tiles + norm.slots) * column_tiles * 4,), "float32")
        w_regs = T.alloc_local((depth * tiles * 8,), "uint32")
        x_regs = T.alloc_local((depth * column_tiles * 4,), "uint32")
        bias_regs = T.alloc_local((end.sided,), end.register(bias_dtype))
        residual_regs = T.alloc_local((end.items,), end.register(residual_dtype))
        warp: T.int32 = thread // 32
        lane: T.int32 = thread % 32
        group: T.int32 = lane // 4
        member: T.int32 = lane % 4
        first: T.int32 = output_block * outputs
        first_row: T.int32 = column_block * columns
        rows: T.int32 = T.min(T.cast(n, "int32") - first_row, columns)
        at: T.int32 = warp * step

        @T.inline
        def load_weight(u, r, start) -> None:
            """Beyond the last output or the end of k some other weight: x is zero there, or the sum is not stored."""
            for h in T.unroll(2):
                base = T.meta_var((u * tiles + r) * 8 + h)
                line = T.meta_var(first + r * tile_results + h * apart + group)
                column = T.meta_var(start + u * CHUNK + member * LANE_K)
                T.ptx[LOAD_WEIGHT](
                    w_regs[base], w_regs[base + 2], w_regs[base + 4], w_regs[base + 6],
                    weight.ptr_to([line if whole_o else T.min(line, o - 1), column if whole_k else T.min(column, k - LANE_K)]),
                )  # fmt: skip

        @T.inline
        def load_x(u, start) -> None:
            for c in T.unroll(column_tiles):
                base = T.meta_var((u * column_tiles + c) * 4)
                column = T.meta_var(start + u * CHUNK + member * LANE_K)
                if not whole_k:
                    for i in T.unroll(4):
                        x_regs[base + i] = T.uint32(0)
                if group + c * 8 < rows and (whole_k or column < k):
                    T.ptx[LOAD_X](
                        x_regs[base], x_regs[base + 1], x_regs[base + 2], x_regs[base + 3],
                        x.ptr_to([T.cast(first_row + group + c * 8, "int64"), column]),
                    )  # fmt: skip

        @T.inline
        def multiply(u, r) -> None:
            for half in T.unroll(2):
                for c in T.unroll(column_tiles):
                    a = T.meta_var((u * tiles + r) * 8 + half * 4)
                    b = T.meta_var((u * column_tiles + c) * 4 + half * 2)
                    s = T.meta_var((r * column_tiles + c) * 4)
                    T.ptx[mma](
                        acc[s], acc[s + 1], acc[s + 2], acc[s + 3], w_regs[a], w_regs[a + 1], w_regs[a + 2], w_regs[a + 3],
                        x_regs[b], x_regs[b + 1], acc[s], acc[s + 1], acc[s + 2], acc[s + 3],
                    )  # fmt: skip

        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        for i in T.unroll((tiles + norm.slots) * column_tiles * 4):
            acc[i] = T.float32(0)
        for i in T.unroll(depth * column_tiles * 4):
            x_regs[i] = T.uint32(0)
        if at < k:
            for u in T.unroll(depth):
                for r in T.unroll(tiles):
                    load_weight(u, r, at)
        end.fetch_bias(bias_regs, bias, thread, first)
        if dependent_launch:
            T.ptx.griddepcontrol.wait()
        if at < k:
            for u in T.unroll(depth):
                load_x(u, at)
        end.fetch_residual(residual_regs, residual, thread, first, first_row, rows)
        while at < k:
            following: T.int32 = at + warps * step
            for u in T.unroll(depth):
                norm.add_squares(acc, x_regs, u, 4, 0, 4)
                for r in T.unroll(tiles):
                    multiply(u, r)
                if following < k:
                    for r in T.unroll(tiles):
                        load_weight(u, r, following)
                    load_x(u, following)
            at = following

        end.store(partial, warp, acc, lane)
        T.cuda.cta_sync()
        end.finish(partial, 0, thread, first, first_row, rows, bias_regs, bias_regs, residual_regs, out)

    return hopper.finish(gemv, f"{'norm_' * norm.here}gemv_{o}x{k}", linear_call.absent(specs), dependent_launch)


reference, roofline = linear_call.reference, linear_call.roofline
