"""Decode attention over few sequences on sm_90a: tensor cores, the positions of a sequence split over a cluster of thread blocks.

A cluster takes one sequence and one KV head with its group of up to 16 query heads; each block of it takes a run of chunks of 16
positions, and each warp every ``warps``-th chunk of those. Keys and values go from the pages straight to registers, as fragments:

- scores = q · kᵀ: A = the group's queries (16 rows), B = keys (8 positions each); the head's elements are permuted alike
  on both sides so that a fragment is 16 consecutive bytes of a key.
- resultᵀ += vᵀ · weightsᵀ: A = vᵀ, put together by ``prmt`` from the rows of two positions, B = the weights, whose fragment
  is the accumulator's layout of the scores: nothing is transposed and nothing passes through shared memory.

:mod:`.kv_fragments` loads keys and values, and widens codes; :mod:`.decode_rotation` rotates queries and the new key, if they come
as the projection left them.

The keys of the next chunk are requested when those of this one are consumed, then the values. The first ones are on their way
before ``griddepcontrol.wait``, but for the last chunk of a sequence where another kernel appends to it: no other kernel of the step
writes what was there before it, nor lengths and block table, and copies between two steps keep those apart. Warps merge through
shared memory; each block of a cluster completes a share of the results, and the others send it what they have of it (distributed
shared memory), which takes half a microsecond less than to fetch it there: one launch, no workspace, no state between launches.
Split softmax as in "Flash-Decoding" (Dao et al., 2023); fragment layouts: PTX ISA, "mma.m16n8k16".
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.decode_rotation import Operands, Rotation, attend_call
from llmc.schedules.cuda.decode_softmax import CHUNK, MASKED, softmaxer
from llmc.schedules.cuda.kv_fragments import LOAD, fragments, loaders
from llmc.schedules.cuda.quantized_codes import as_float
from llmc.schedules.protocol import KernelCall


def kernel(call: KernelCall, config: dict[str, Any]) -> Any:
    """The PrimFunc of a call of ``llmc.attend`` or ``llmc.rope_attend``; ``config`` as :mod:`.decode_attention` has it."""
    rotation, attention = Rotation(call), attend_call(call)
    operands = Operands(call, rotation)
    hq, d = (int(v) for v in attention.args[0].shape[1:])
    hk, dv, page_size = int(attention.args[1].shape[1]), int(call.attr("v_dim")), int(call.attr("page_size"))
    group, dtype, out_dtype, fused = hq // hk, attention.args[0].dtype, call.result.dtype, rotation.here
    has_sinks = bool(call.attr("sinks"))
    window, span = int(call.attr("window")), int(call.attr("chunk"))

    most, fill, warps, least, min_blocks = (int(config[axis]) for axis in ("split", "fill", "warps", "least", "min_blocks"))
    dependent_launch = bool(config["dependent_launch"])
    threads, halves, page_chunks = 32 * warps, -(-group // 8), page_size // CHUNK
    # A lane holds d / 4 elements of a query, dv / 8 of a result tile's rows: two to a register.
    k_regs, v_regs = d // 8, dv // 16
    wide_v, has_middle = dv // 64, dv % 64 >= 32
    read = fragments(attention)
    k_words, v_words, codes = read.key_words, read.value_words, read.codes
    key_scales, value_scales = (read.layout.key_parameters, read.layout.value_parameters) if codes else (0, 0)
    # Results in runs of one for each thread, and what a block may have to hold of them.
    runs = -(-group * dv // threads)
    held = max(size * -(-runs // size) * threads for size in (1, 2, 4, 8) if size <= most)
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    held_key, held_value = loaders(d, dv, "ld.shared")
    softmax = softmaxer(attention, halves, v_regs, lambda member, j, e: member * 4 + j * 2 + e, bool(codes))

    def cluster(sequences: Any) -> Any:
        """Blocks of a cluster: the largest power of two that does not fill the GPU more than once. Half of it is enough for those
        of four and eight, which have to find room in a group of its multiprocessors: the last ones would wait for the first."""
        size: Any = T.int32(1)
        for power in (2, 4, 8):
            if power <= most:
                size = T.if_then_else(sequences * (hk * power) <= (fill if power == 2 else fill // 2), T.int32(power), size)
        return size

    def element(tile: Any, lane_row: Any) -> Any:
        """The value's element in row ``lane_row`` of result tile ``tile``; row + 8 is the next one."""
        wide = tile // 4 * 64 + lane_row * 8 + tile % 4 * 2
        middle = wide_v * 64 + lane_row * 4 + (tile - wide_v * 4) * 2
        narrow = dv - 16 + lane_row * 2
        rest = T.Select(tile < wide_v * 4 + 2 * has_middle, middle, narrow)
        return T.Select(tile < wide_v * 4, wide, rest)

    @T.prim_func
    def attend(
        q_ptr: T.handle, qkv_ptr: T.handle, cos_ptr: T.handle, sin_ptr: T.handle, slots_ptr: T.handle, pages_ptr: T.handle,
        table_ptr: T.handle, lens_ptr: T.handle, starts_ptr: T.handle, q_weight_ptr: T.handle, k_weight_ptr: T.handle,
        sinks_ptr: T.handle, out_ptr: T.handle,
    ) -> None:  # fmt: skip
        b = T.int64()
        rows = T.int64()
        num_pages = T.int64()
        max_pages = T.int64()
        q, qkv, cos, sin, slots, table, lens, starts, q_weight, k_weight, sinks = operands.match(  # noqa: RUF059
            q_ptr, qkv_ptr, cos_ptr, sin_ptr, slots_ptr, table_ptr, lens_ptr, starts_ptr, q_weight_ptr, k_weight_ptr, sinks_ptr,
            b, rows, max_pages,
        )  # fmt: skip
        pages = T.match_buffer(pages_ptr, (num_pages, hk, read.layout.width), read.layout.dtype, align=16)
        out = T.match_buffer(out_ptr, (rows, hq, dv), out_dtype, align=16)
        T.device_entry()
        if min_blocks > 0:
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": min_blocks})
        split = T.meta_var(cluster(T.cast(b, "int32")))
        rank = T.cta_id_in_cluster([split])  # noqa: F841
        part, head, sequence = T.cta_id([split, hk, T.cast(b, "int32")])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        # Of each warp; padded rows spread the 8 lanes that write a column over the banks.
        s_sums = pool.alloc((warps, group, dv + 4), "float32", align=16)
        s_top = pool.alloc((warps, group), "float32", align=16)
        s_total = pool.alloc((warps, group), "float32", align=16)
        # Of every block of the cluster, for the results that this one completes.
        b_sums = pool.alloc((held,), "float32", align=16)
        b_top = pool.alloc((most, group), "float32", align=16)
        b_total = pool.alloc((most, group), "float32", align=16)
        if fused:
            turned = pool.alloc((1, rotation.vectors, rotation.stride), dtype, align=16)
        pool.commit()
        if fused:
            gains = T.alloc_local((rotation.gains,), "float32")
        q_regs = T.alloc_local((halves * k_regs,), "uint32")
        keys = T.alloc_local((2 * k_words,), "uint32")
        values = T.alloc_local((4 * v_words,), "uint32")
        scales = T.alloc_local((4,), "uint32")  # bfloat16, of positions 4 t .. 4 t + 3: of their keys, of their values
        sums = T.alloc_local((halves * v_regs * 4,), "float32")
        score = T.alloc_local((8,), "float32")
        top = T.alloc_local((halves,), "float32")
        total = T.alloc_local((halves,), "float32")
        k_fragment = T.alloc_local((2,), "uint32")
        v_fragment = T.alloc_local((4,), "uint32")
        p_fragment = T.alloc_local((halves * 2,), "uint32")
        factor = T.alloc_local((1,), "float32")
        remote = T.alloc_local((1,), "uint32")
        blocks: T.int32 = split
        warp: T.int32 = thread // 32
        lane: T.int32 = thread % 32
        lane_row: T.int32 = lane // 4
        member: T.int32 = lane % 4

        @T.inline
        def load_scales(i, chunk, page, start) -> None:
            """Those of the lane's four positions; in the last chunk some are beyond the end, in the same page."""
            if codes:
                slot = T.meta_var(chunk % page_chunks * CHUNK + member * 4)
                T.ptx[LOAD + ".v2.b32"](scales[i], scales[i + 1], pages.ptr_to([T.cast(page, "int64"), head, start + slot * 2]))

        @T.inline
        def load_keys(chunk, page) -> None:
            """B fragments of two tiles of 8 positions: column g of tile j is position g / 2 * 4 + 2 j + g % 2 of the chunk."""
            for j in T.unroll(2):
                slot = T.meta_var(
                    T.min(lane_row // 2 * 4 + 2 * j + lane_row % 2, length - 1 - chunk * CHUNK) + chunk % page_chunks * CHUNK
                )
                read.load_key(keys, j * k_words, pages, page, head, slot * read.layout.key_width, member)
            load_scales(0, chunk, page, key_scales)

        @T.inline
        def load_values(chunk, page) -> None:
            """Position 4 t + i of the chunk: a lane's elements of it make rows g and g + 8 of the result tiles (``element``)."""
            for i in T.unroll(4):
                slot = T.meta_var(T.min(member * 4 + i, length - 1 - chunk * CHUNK) + chunk % page_chunks * CHUNK)
                start = T.meta_var(read.layout.values + slot * read.layout.value_width)
                read.load_value(values, i * v_words, pages, page, head, start, lane_row)
            load_scales(2, chunk, page, value_scales)

        @T.inline
        def load_queries() -> None:
            for i in T.unroll(halves * k_regs):
                q_regs[i] = T.uint32(0)
            for h in T.unroll(halves):
                member_head = T.meta_var(h * 8 + lane_row)
                if member_head < group:
                    if fused:
                        held_key(q_regs, h * k_regs, turned, 0, member_head, 0, member)
                    else:
                        read.load_query(q_regs, h * k_regs, q, sequence, head * group + member_head, 0, member)
            read.permute(q_regs, halves * k_regs)

        @T.inline
        def take_newest() -> None:
            """In the last chunk: the new position, and what lies beyond it, from shared memory."""
            for j in T.unroll(2):
                if chunk * CHUNK + lane_row // 2 * 4 + 2 * j + lane_row % 2 >= length - 1:
                    held_key(keys, j * k_words, turned, 0, group, 0, member)
            for i in T.unroll(4):
                if chunk * CHUNK + member * 4 + i >= length - 1:
                    held_value(values, i * v_words, turned, 0, group + 1, 0, lane_row)

        @T.inline
        def multiply_keys() -> None:
            for i in T.unroll(8):
                score[i] = T.float32(0)
            for j in T.unroll(2):
                for s in T.unroll(d // 16):
                    read.key(k_fragment, keys, j * k_words, s)
                    upper = T.meta_var((k_regs if halves > 1 else 0) + s * 2)
                    T.ptx[mma](
                        score[j * 4], score[j * 4 + 1], score[j * 4 + 2], score[j * 4 + 3],
                        q_regs[s * 2], q_regs[upper] if halves > 1 else T.uint32(0),
                        q_regs[s * 2 + 1], q_regs[upper + 1] if halves > 1 else T.uint32(0),
                        k_fragment[0], k_fragment[1], score[j * 4], score[j * 4 + 1], score[j * 4 + 2], score[j * 4 + 3],
                    )  # fmt: skip
            if codes:
                for i in T.unroll(8):  # position 4 t + 2 (i / 4) + i % 2
                    score[i] = score[i] * as_float(scales[i // 4], i % 2, "bfloat16")

        @T.inline
        def multiply_values() -> None:
            for m in T.unroll(v_regs):
                for pair in T.unroll(2):
                    read.value(v_fragment, pair * 2, values, 2 * pair * v_words, (2 * pair + 1) * v_words, m)
                for h in T.unroll(halves):
                    s = T.meta_var((h * v_regs + m) * 4)
                    T.ptx[mma](
                        sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                        v_fragment[0], v_fragment[1], v_fragment[2], v_fragment[3], p_fragment[h * 2], p_fragment[h * 2 + 1],
                        sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                    )  # fmt: skip

        @T.inline
        def send(value, block, address) -> None:
            """``value`` to the same place in the shared memory of another block of the cluster."""
            T.ptx.mapa.shared__cluster.u32(remote[0], T.cuda.cvta_generic_to_shared(address), T.cast(block, "uint32"))
            T.ptx["st.shared::cluster.f32"](remote[0], value)

        # That this block is there, and may be sent to.
        T.ptx["barrier.cluster.arrive.release.aligned"]()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        length: T.int32 = lens[sequence]
        slot: T.int32 = slots[sequence] if fused else -1
        low: T.int32 = 0
        if window > 0:
            low = T.max(low, length - window)
        if span > 0:
            low = T.max(low, (length - 1) // span * span)
        chunks: T.int32 = (length + CHUNK - 1) // CHUNK
        first_chunk: T.int32 = low // CHUNK
        per_block: T.int32 = T.max((chunks - first_chunk + blocks - 1) // blocks, least)
        used: T.int32 = T.min((chunks - first_chunk + per_block - 1) // per_block, blocks)
        end: T.int32 = T.min(first_chunk + (part + 1) * per_block, chunks)
        chunk: T.int32 = first_chunk + part * per_block + warp
        page: T.int32 = 0
        for h in T.unroll(halves):
            top[h] = T.float32(MASKED)
            total[h] = T.float32(0)
        for i in T.unroll(halves * v_regs * 4):
            sums[i] = T.float32(0)
        if chunk < end:
            page = table[sequence, chunk // page_chunks]
        # Other kernels of the step write the last chunk, if any does.
        early: T.int32 = T.min(end, chunks if fused else chunks - 1)
        if dependent_launch:
            if chunk < early:
                load_keys(chunk, page)
                load_values(chunk, page)
            if fused:
                rotation.load_gains(gains, q_weight, k_weight, lane)
            T.ptx.griddepcontrol.wait()
        if fused:
            if not dependent_launch:
                rotation.load_gains(gains, q_weight, k_weight, lane)
            rotation.turn(
                qkv, cos, sin, gains, pages, turned, 0, sequence, head, warp, warps, -(-rotation.vectors // warps), lane,
                first_chunk + part * per_block < chunks and end == chunks, slot,
            )  # fmt: skip
            T.cuda.cta_sync()
        load_queries()
        if chunk < end:
            if not dependent_launch or chunk >= early:
                load_keys(chunk, page)
                load_values(chunk, page)
            # The page of the next chunk is known before its keys are asked for.
            page = table[sequence, T.min(chunk + warps, chunks - 1) // page_chunks]
        while chunk < end:
            following: T.int32 = chunk + warps
            next_page: T.int32 = page
            page = table[sequence, T.min(following + warps, chunks - 1) // page_chunks]
            if fused and chunk == chunks - 1:
                take_newest()
            multiply_keys()
            if following < end:
                load_keys(following, next_page)
            softmax(chunk, low, length, member, score, top, total, sums, factor, p_fragment, scales)
            multiply_values()
            if following < end:
                load_values(following, next_page)
            chunk = following

        for h in T.unroll(halves):
            total[h] = total[h] + T.tvm_warp_shuffle_xor(T.uint32(hopper.FULL_WARP), total[h], 1, 32, 32)
            total[h] = total[h] + T.tvm_warp_shuffle_xor(T.uint32(hopper.FULL_WARP), total[h], 2, 32, 32)
            if member == 0 and h * 8 + lane_row < group:
                s_top[warp, h * 8 + lane_row] = top[h]
                s_total[warp, h * 8 + lane_row] = total[h]
            for m in T.unroll(v_regs):
                for i in T.unroll(4):
                    if h * 8 + member * 2 + i % 2 < group:
                        s_sums[warp, h * 8 + member * 2 + i % 2, element(m, lane_row) + i // 2] = sums[(h * v_regs + m) * 4 + i]
        T.cuda.cta_sync()
        T.ptx["barrier.cluster.wait.acquire.aligned"]()
        # Each block completes every ``blocks``-th run of ``threads`` results; whoever has a part of one sends it there.
        shares: T.int32 = (runs + blocks - 1) // blocks
        run: T.int32 = 0
        while run * threads + thread < group * dv and part < used:
            h_own: T.int32 = (run * threads + thread) // dv
            column: T.int32 = (run * threads + thread) % dv
            highest: T.float32 = s_top[0, h_own]
            for w in T.unroll(warps - 1):
                highest = T.max(highest, s_top[w + 1, h_own])
            weight: T.float32 = T.float32(0)
            result: T.float32 = T.float32(0)
            for w in T.unroll(warps):
                T.ptx["ex2.approx.ftz.f32"](factor[0], s_top[w, h_own] - highest)
                weight = weight + s_total[w, h_own] * factor[0]
                result = result + s_sums[w, h_own, column] * factor[0]
            send(result, run % blocks, b_sums.ptr_to([(part * shares + run // blocks) * threads + thread]))
            if column < blocks:
                send(highest, column, b_top.ptr_to([part, h_own]))
                send(weight, column, b_total.ptr_to([part, h_own]))
            run = run + 1
        T.ptx["barrier.cluster.arrive.release.aligned"]()
        T.ptx["barrier.cluster.wait.acquire.aligned"]()

        run = 0
        while (part + run * blocks) * threads + thread < group * dv:
            item: T.int32 = (part + run * blocks) * threads + thread
            h_out: T.int32 = item // dv
            best: T.float32 = T.float32(MASKED)
            if has_sinks:
                best = T.cast(sinks[head * group + h_out], "float32") * T.float32(hopper.LOG2E)
            sink: T.float32 = best
            for block in T.unroll(most):
                if block < used:
                    best = T.max(best, b_top[block, h_out])
            all_weight: T.float32 = T.float32(0)
            all_result: T.float32 = T.float32(0)
            for block in T.unroll(most):
                if block < used:
                    T.ptx["ex2.approx.ftz.f32"](factor[0], b_top[block, h_out] - best)
                    all_weight = all_weight + b_total[block, h_out] * factor[0]
                    all_result = all_result + b_sums[(block * shares + run) * threads + thread] * factor[0]
            if has_sinks:
                T.ptx["ex2.approx.ftz.f32"](factor[0], sink - best)
                all_weight = all_weight + factor[0]
            # A sequence without positions (padding of a batch) has a result of 0.
            if all_weight > T.float32(0):
                all_result = all_result / all_weight
            out[sequence, head * group + h_out, item % dv] = T.cast(all_result, out_dtype)
            run = run + 1

    unused = rotation.unused | (set() if has_sinks else {"sinks"})
    return hopper.finish(attend, f"{'rope' if fused else 'decode'}_attention_{hq}x{hk}x{d}", unused, dependent_launch)
