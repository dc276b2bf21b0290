"""Decode attention over many sequences on sm_90a: a warp takes the positions of a sequence for one KV head, chunk by chunk.

With hundreds of pairs of a sequence and a KV head the GPU is full without cutting them up, and a chunk of 16 positions is best
fetched without registers: every warp has a ring of ``depth`` chunks in shared memory, which one of its lanes fills by TMA (128-byte
swizzle) and all read by ``ldmatrix``. Nothing is shared between warps until the end, so none waits for another. It fills before
``griddepcontrol.wait`` with what earlier steps wrote, all but the last chunk (see :mod:`.decode_attention`).

- scores = q · kᵀ: A = the group's queries (16 rows), B = keys, 8 positions each.
- resultᵀ += vᵀ · weightsᵀ: A = vᵀ by transposing ``ldmatrix``, B = the weights, whose fragment is the accumulator's layout.

``parts`` warps of a block may share a sequence, every ``parts``-th chunk each, and merge their sums at the end. The kernel of
:mod:`.decode_attention` for many sequences; PTX ISA, "mma.m16n8k16", "ldmatrix".
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.decode_rotation import Operands, Rotation, attend_call
from llmc.schedules.cuda.decode_softmax import CHUNK, MASKED, softmaxer
from llmc.schedules.kv_pages import stored_as
from llmc.schedules.protocol import KernelCall

WARPS = 4
SHARED = 113 << 10
"""Bytes of shared memory of a block: two blocks to a multiprocessor."""

DEEPEST = 6
LOAD_ROWS = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_COLUMNS = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


def depth(call: KernelCall) -> int:
    """Chunks of a warp's ring; less than 2: the kernel does not take such heads."""
    attention, rotation = attend_call(call), Rotation(call)
    (hq, d), hk = (int(v) for v in attention.args[0].shape[1:]), int(attention.args[1].shape[1])
    staging = WARPS * ((hq // hk) * (4 * (d + 4) + 8) + rotation.here * rotation.vectors * rotation.stride * 2)
    return min(DEEPEST, (SHARED - staging) // (WARPS * 2 * CHUNK * d * 2))


def takes(call: KernelCall) -> bool:
    """Whether a call that :mod:`.decode_attention` takes fits: 16-bit keys and values of whole 128-byte atoms."""
    q, pages = attend_call(call).args[:2]
    d = int(q.shape[2])
    if stored_as(call, pages) != q.dtype or d != int(call.attr("v_dim")) or d % hopper.ATOM:
        return False
    return depth(call) >= 2


def kernel(call: KernelCall, parts: int, dependent_launch: bool) -> Any:
    """The PrimFunc of ``call`` with ``parts`` (1, 2 or 4) warps to a pair of a sequence and a KV head."""
    rotation, attention = Rotation(call), attend_call(call)
    operands = Operands(call, rotation)
    hq, d = (int(v) for v in attention.args[0].shape[1:])
    hk, page_size = int(attention.args[1].shape[1]), int(call.attr("page_size"))
    group, dtype, out_dtype, fused = hq // hk, attention.args[0].dtype, call.result.dtype, rotation.here
    has_sinks = bool(call.attr("sinks"))
    window, span = int(call.attr("window")), int(call.attr("chunk"))

    stages, atoms, page_chunks, pairs = depth(call), d // hopper.ATOM, page_size // CHUNK, WARPS // parts
    halves, steps, threads = -(-group // 8), d // 16, 32 * WARPS
    chunk_bytes = 2 * CHUNK * d * 2
    mma_type = hopper.PTX_TYPE[dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{mma_type}.{mma_type}.f32"
    softmax = softmaxer(attention, halves, steps, lambda member, j, e: j * 8 + member * 2 + e, False)

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
        pages = T.match_buffer(pages_ptr, (num_pages, hk, page_size * 2 * d), dtype, align=16)
        out = T.match_buffer(out_ptr, (rows, hq, d), out_dtype, align=16)
        # A page of a head is 2 * page_size rows of d: its keys, then its values.
        kv_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(kv_map, dtype, pages.data, columns=d, rows=num_pages * (hk * 2 * page_size), box_rows=CHUNK)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 2})
        block = T.cta_id([T.cast((b * hk + (pairs - 1)) // pairs, "int32")])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        s_kv = pool.alloc((WARPS, stages, 2, atoms, CHUNK, hopper.ATOM), dtype, align=1024)
        full = pool.alloc((WARPS, stages), "uint64", align=8)
        # Of each warp; padded rows spread the 8 lanes that write a column over the banks.
        s_sums = pool.alloc((WARPS, group, d + 4), "float32", align=16)
        s_top = pool.alloc((WARPS, group), "float32", align=16)
        s_total = pool.alloc((WARPS, group), "float32", align=16)
        if fused:
            turned = pool.alloc((pairs, rotation.vectors, rotation.stride), dtype, align=16)
        pool.commit()
        if fused:
            gains = T.alloc_local((rotation.gains,), "float32")
        warp: T.int32 = hopper.shuffle(thread // 32, 0)
        lane: T.int32 = thread % 32
        lane_row: T.int32 = lane // 4
        member: T.int32 = lane % 4
        if lane == 0:
            for i in T.unroll(stages):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([warp, i]), T.uint32(1))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.warp_sync()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()

        q_regs = T.alloc_local((halves * steps * 2,), "uint32")
        sums = T.alloc_local((halves * steps * 4,), "float32")
        score = T.alloc_local((8,), "float32")
        top = T.alloc_local((halves,), "float32")
        total = T.alloc_local((halves,), "float32")
        fragment = T.alloc_local((4,), "uint32")
        p_fragment = T.alloc_local((halves * 2,), "uint32")
        factor = T.alloc_local((1,), "float32")
        pair: T.int32 = block * pairs + warp // parts
        part: T.int32 = warp % parts
        exists: T.bool = pair < T.cast(b, "int32") * hk
        sequence: T.int32 = T.min(pair // hk, T.cast(b, "int32") - 1)
        head: T.int32 = pair % hk
        length: T.int32 = 0
        slot: T.int32 = -1
        if exists:
            length = lens[sequence]
            if fused:
                slot = slots[sequence]
        low: T.int32 = 0
        if window > 0:
            low = T.max(low, length - window)
        if span > 0:
            low = T.max(low, (length - 1) // span * span)
        # The i-th chunk of this warp is first + i * parts.
        first: T.int32 = low // CHUNK + part
        last: T.int32 = (length + CHUNK - 1) // CHUNK - 1
        count: T.int32 = T.max(last - first + parts, 0) // parts
        # Pages of 32 of the warp's chunks, one in each lane, and of the next 32.
        page = T.alloc_local((2,), "int32")
        asked = T.alloc_local((1,), "int32")

        @T.inline
        def look_up(to, i) -> None:
            page[to] = 0
            if count > 0:
                page[to] = table[sequence, T.min(first + (i + lane) * parts, last) // page_chunks]

        @T.inline
        def fetch(stage) -> None:
            """Ask for the warp's next chunk, if there is one."""
            if asked[0] < count:
                if asked[0] > 0 and asked[0] % 32 == 0:
                    page[0] = page[1]
                    look_up(1, asked[0] + 32)
                chunk = T.meta_var(first + asked[0] * parts)
                own: T.int32 = hopper.shuffle(page[0], asked[0] % 32)
                row: T.int32 = (own * hk + head) * (2 * page_size) + chunk % page_chunks * CHUNK
                if lane == 0:
                    T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([warp, stage]), T.uint32(chunk_bytes))
                    for side in T.unroll(2):
                        for a in T.unroll(atoms):
                            T.ptx[hopper.TMA_LOAD](
                                s_kv.ptr_to([warp, stage, side, a, 0, 0]), T.address_of(kv_map), a * hopper.ATOM,
                                row + side * page_size, full.ptr_to([warp, stage]),
                            )  # fmt: skip
                asked[0] = asked[0] + 1

        @T.inline
        def piece(stage, side, step) -> None:
            """The 8x8 matrices of 16 columns, positions are rows. Lane l addresses row l % 8 of matrix l // 8."""
            at = T.meta_var(
                s_kv.ptr_to([warp, stage, side, step // 4, lane // 16 * 8 + lane % 8,
                             T.bitwise_xor(step % 4 * 2 + lane // 8 % 2, lane % 8) * 8])
            )  # fmt: skip
            if side == 0:
                T.ptx[LOAD_ROWS](fragment[0], fragment[1], fragment[2], fragment[3], at)
            else:
                T.ptx[LOAD_COLUMNS](fragment[0], fragment[1], fragment[2], fragment[3], at)

        @T.inline
        def multiply_keys(stage) -> None:
            for i in T.unroll(8):
                score[i] = T.float32(0)
            for s in T.unroll(steps):
                piece(stage, 0, s)
                upper = T.meta_var((steps if halves > 1 else 0) * 2 + s * 2)
                for j in T.unroll(2):
                    T.ptx[mma](
                        score[j * 4], score[j * 4 + 1], score[j * 4 + 2], score[j * 4 + 3],
                        q_regs[s * 2], q_regs[upper] if halves > 1 else T.uint32(0),
                        q_regs[s * 2 + 1], q_regs[upper + 1] if halves > 1 else T.uint32(0),
                        fragment[j * 2], fragment[j * 2 + 1], score[j * 4], score[j * 4 + 1], score[j * 4 + 2], score[j * 4 + 3],
                    )  # fmt: skip

        @T.inline
        def multiply_values(stage) -> None:
            for m in T.unroll(steps):
                piece(stage, 1, m)
                for h in T.unroll(halves):
                    s = T.meta_var((h * steps + m) * 4)
                    # Matrices: dims 0-7 and 8-15 of positions 0-7, then of 8-15, which is the order of the A fragment.
                    T.ptx[mma](
                        sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                        fragment[0], fragment[1], fragment[2], fragment[3], p_fragment[h * 2], p_fragment[h * 2 + 1],
                        sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                    )  # fmt: skip

        @T.inline
        def take_newest(stage) -> None:
            """The new position to its place among the fetched ones: two elements of each atom a lane."""
            word = T.alloc_local((1,), "uint32")
            row = T.meta_var((length - 1) % CHUNK)
            for side in T.unroll(2):
                for a in T.unroll(atoms):
                    T.ptx["ld.shared.b32"](word[0], turned.ptr_to([warp // parts, group + side, a * hopper.ATOM + lane * 2]))
                    column = T.meta_var(T.bitwise_xor(lane // 4, row % 8) * 8 + lane % 4 * 2)
                    T.ptx["st.shared.b32"](s_kv.ptr_to([warp, stage, side, a, row, column]), word[0])
            T.cuda.warp_sync()

        asked[0] = 0
        look_up(0, 0)
        look_up(1, 32)
        if fused:
            rotation.load_gains(gains, q_weight, k_weight, lane)
        if dependent_launch:
            for s in T.unroll(stages):
                if first + asked[0] * parts < (last + 1 if fused else last):
                    fetch(s)
            T.ptx.griddepcontrol.wait()
        for s in T.unroll(stages):
            if asked[0] == s:
                fetch(s)
        if fused:
            # The warps of a pair share the work.
            if exists:
                rotation.turn(
                    qkv, cos, sin, gains, pages, turned, warp // parts, sequence, head, part, parts, -(-rotation.vectors // parts),
                    lane, length > 0, slot,
                )  # fmt: skip
            if parts == 1:
                T.cuda.warp_sync()
            elif parts == WARPS:
                T.cuda.cta_sync()
            else:
                T.ptx.bar.sync(T.cast(1 + warp // parts, "uint32"), T.uint32(32 * parts))
        for h in T.unroll(halves):
            top[h] = T.float32(MASKED)
            total[h] = T.float32(0)
            for s in T.unroll(steps * 2):
                q_regs[h * steps * 2 + s] = T.uint32(0)
            if h * 8 + lane_row < group and exists:
                for s in T.unroll(steps * 2):
                    at = T.meta_var(s * 8 + member * 2)
                    if fused:
                        T.ptx["ld.shared.b32"](q_regs[h * steps * 2 + s], turned.ptr_to([warp // parts, h * 8 + lane_row, at]))
                    else:
                        T.ptx["ld.global.b32"](q_regs[h * steps * 2 + s], q.ptr_to([sequence, head * group + h * 8 + lane_row, at]))
        for i in T.unroll(halves * steps * 4):
            sums[i] = T.float32(0)
        done: T.int32 = 0
        stage: T.int32 = 0
        phase: T.int32 = 0
        while done < count:
            T.cuda.mbarrier_wait(full.ptr_to([warp, stage]), phase)
            if fused and first + done * parts == last:
                take_newest(stage)
            multiply_keys(stage)
            softmax(first + done * parts, low, length, member, score, top, total, sums, factor, p_fragment, factor)
            multiply_values(stage)
            # All lanes have read the chunk before the next one takes its place.
            T.cuda.warp_sync()
            fetch(stage)
            stage = stage + 1
            if stage == stages:
                stage = 0
                phase = phase ^ 1
            done = done + 1

        for h in T.unroll(halves):
            total[h] = total[h] + hopper.exchange(total[h], 1)
            total[h] = total[h] + hopper.exchange(total[h], 2)
            if member == 0 and h * 8 + lane_row < group:
                s_top[warp, h * 8 + lane_row] = top[h]
                s_total[warp, h * 8 + lane_row] = total[h]
            for m in T.unroll(steps):
                for i in T.unroll(4):
                    if h * 8 + member * 2 + i % 2 < group:
                        s_sums[warp, h * 8 + member * 2 + i % 2, m * 16 + lane_row + i // 2 * 8] = sums[(h * steps + m) * 4 + i]
        T.cuda.cta_sync()
        # Two neighbouring elements of a head at a time.
        item: T.int32 = thread
        while item < pairs * group * (d // 2):
            own_pair: T.int32 = item // (group * (d // 2))
            own_head: T.int32 = item // (d // 2) % group
            at_pair: T.int32 = block * pairs + own_pair
            element: T.int32 = item % (d // 2) * 2
            if at_pair < T.cast(b, "int32") * hk:
                query: T.int32 = at_pair % hk * group + own_head
                best: T.float32 = T.float32(MASKED)
                if has_sinks:
                    best = T.cast(sinks[query], "float32") * T.float32(hopper.LOG2E)
                sink: T.float32 = best
                for p in T.unroll(parts):
                    best = T.max(best, s_top[own_pair * parts + p, own_head])
                weight: T.float32 = T.float32(0)
                even: T.float32 = T.float32(0)
                odd: T.float32 = T.float32(0)
                for p in T.unroll(parts):
                    w = T.meta_var(own_pair * parts + p)
                    T.ptx["ex2.approx.ftz.f32"](factor[0], s_top[w, own_head] - best)
                    weight = weight + s_total[w, own_head] * factor[0]
                    even = even + s_sums[w, own_head, element] * factor[0]
                    odd = odd + s_sums[w, own_head, element + 1] * factor[0]
                if has_sinks:
                    T.ptx["ex2.approx.ftz.f32"](factor[0], sink - best)
                    weight = weight + factor[0]
                # A sequence without positions (padding of a batch) has a result of 0.
                if weight > T.float32(0):
                    even = even / weight
                    odd = odd / weight
                out[at_pair // hk, query, element] = T.cast(even, out_dtype)
                out[at_pair // hk, query, element + 1] = T.cast(odd, out_dtype)
            item = item + threads

    unused = rotation.unused | (set() if has_sinks else {"sinks"})
    return hopper.finish(attend, f"decode_ring_{hq}x{hk}x{d}", unused, dependent_launch)
