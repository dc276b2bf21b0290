"""Flash attention over pages with TMA and wgmma on sm_90a, for rows of any raggedness: the kernel of :mod:`.prefill_attention`.

A thread block takes 128 (or 64) rows of one sequence: of a few tokens, all the query heads that share a KV head (a row is a
token's head, heads fastest), so that a step of single tokens needs a block for each KV head and not for each query head, and
reads their keys once. One warp copies: the tile of queries once, then keys and values tile by tile, each lane the boxes of one
page. Two warpgroups (or one) compute, 64 rows each: S = QK', online softmax in registers, O += PV with P from registers. QK' of
tile j is issued before PV of tile j - 1, so that the softmax runs while the tensor cores work (Shah et al., 2024,
"FlashAttention-3").

A head is copied in boxes of 64 columns, what is behind its end as zeros, which no multiplication reads.

The grid is an upper bound made of n and b alone, ``n // tokens + b`` tiles: nothing is computed on the host, and every block
finds its rows in ``q_indptr``; blocks too many leave at once. Tokens behind ``q_indptr[b]`` (padding) are not written.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.softmax_hopper import MASKED, Rules, accumulate, cap, mask
from llmc.schedules.protocol import KernelCall

PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = {128: 240, 64: 232}
"""By query rows of a thread block: one block of two computing warpgroups fills a multiprocessor, or two blocks of one."""


def packed_heads(group: int, rows: int) -> int:
    """How many of the ``group`` query heads of a KV head share a tile: the most, up to 16, that leave few of its rows empty."""
    return max(h for h in range(1, 17) if group % h == 0 and rows // h * h >= rows * 15 // 16)


def kernel(call: KernelCall, rows: int, keys: int, depth: int, dependent_launch: bool) -> Any:
    """The PrimFunc of ``call`` with ``rows`` of a thread block (64 or 128), ``keys`` positions of a tile, and ``depth`` tiles of
    keys, and of values, in shared memory.
    """
    hq, d = (int(v) for v in call.args[0].shape[1:])
    hk, page_size = int(call.args[1].shape[1]), int(call.attr("page_size"))
    dtype, has_sinks = call.args[0].dtype, bool(call.attr("sinks"))
    sinks_dtype = call.args[5].dtype if has_sinks else dtype
    rules = Rules(*(call.attr(name) for name in ("scale", "softcap", "window", "chunk")))
    packed = packed_heads(hq // hk, rows)
    tokens, bundles, groups = rows // packed, hq // hk // packed, rows // 64
    tile_pages, atoms = keys // page_size, -(-d // hopper.ATOM)
    q_atom_bytes, kv_atom_bytes = rows * 128, keys * 128
    q_bytes, kv_bytes = tokens * packed * 128 * atoms, kv_atom_bytes * atoms
    scores, values, fragments = keys // 2, d // 2, keys // 4
    types = f"f32.{hopper.PTX_TYPE[dtype]}.{hopper.PTX_TYPE[dtype]}"
    qk_mma = f"wgmma.mma_async.sync.aligned.m64n{keys}k16.{types}"
    pv_mma = f"wgmma.mma_async.sync.aligned.m64n{d}k16.{types}"
    to_pair = hopper.packed_convert(dtype)

    @T.prim_func
    def prefill(
        q_ptr: T.handle,
        kv_pages_ptr: T.handle,
        block_table_ptr: T.handle,
        seq_lens_ptr: T.handle,
        q_indptr_ptr: T.handle,
        sinks_ptr: T.handle,
        out_ptr: T.handle,
    ) -> None:
        n = T.int64()
        num_pages = T.int64()
        b = T.int64()
        m = T.int64()
        q = T.match_buffer(q_ptr, (n, hq, d), dtype, align=16)
        kv_pages = T.match_buffer(kv_pages_ptr, (num_pages, hk, page_size * 2 * d), dtype, align=16)
        block_table = T.match_buffer(block_table_ptr, (b, m), "int32", align=4)
        seq_lens = T.match_buffer(seq_lens_ptr, (b,), "int32", align=4)
        q_indptr = T.match_buffer(q_indptr_ptr, (b + 1,), "int32", align=4)
        sinks = T.match_buffer(sinks_ptr, (hq,), sinks_dtype, align=4)
        out = T.match_buffer(out_ptr, (n, hq, d), dtype, align=16)
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.call_packed(
            "runtime.cuTensorMapEncodeTiled", q_map, dtype, 3, q.data, d, hq, n, d * 2, hq * d * 2, hopper.ATOM, packed, tokens,
            1, 1, 1, 0, hopper.SWIZZLE_128B, hopper.L2_PROMOTION_128B, 0,
        )  # fmt: skip
        # A page of a head is 2 * page_size rows of d: its keys, then its values.
        kv_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        hopper.encode_tensor_map(kv_map, dtype, kv_pages.data, columns=d, rows=num_pages * (hk * 2 * page_size), box_rows=page_size)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 128 // rows})
        bundle, block = T.cta_id([hq // packed, T.cast(n // tokens + b, "int32")])
        thread = T.thread_id([128 + 2 * rows])
        pool = T.SMEMPool()
        s_q = pool.alloc((atoms, rows, hopper.ATOM), dtype, align=1024)
        s_k = pool.alloc((depth, atoms, keys, hopper.ATOM), dtype, align=1024)
        s_v = pool.alloc((depth, atoms, keys, hopper.ATOM), dtype, align=1024)
        q_full = pool.alloc((1,), "uint64", align=8)
        k_full = pool.alloc((depth,), "uint64", align=8)
        v_full = pool.alloc((depth,), "uint64", align=8)
        k_empty = pool.alloc((depth,), "uint64", align=8)
        v_empty = pool.alloc((depth,), "uint64", align=8)
        pool.commit()
        warpgroup: T.int32 = hopper.shuffle(thread // 128, 0)
        lane: T.int32 = thread % 32
        if thread == 0:
            T.ptx.mbarrier.init.shared.b64(q_full.ptr_to([0]), T.uint32(1))
            for i in T.unroll(depth):
                T.ptx.mbarrier.init.shared.b64(k_full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(v_full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(k_empty.ptr_to([i]), T.uint32(groups))
                T.ptx.mbarrier.init.shared.b64(v_empty.ptr_to([i]), T.uint32(groups))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()

        # Which sequence has tile `block`: every warp counts tiles, 32 sequences at a time.
        batch: T.int32 = T.cast(b, "int32")
        sequence: T.int32 = batch
        tile_in_sequence: T.int32 = 0
        tiles_before: T.int32 = 0
        candidate: T.int32 = 0
        while candidate < batch:
            tiles: T.int32 = 0
            if candidate + lane < batch:
                tiles = (q_indptr[candidate + lane + 1] - q_indptr[candidate + lane] + (tokens - 1)) // tokens
            end: T.int32 = tiles
            for i in T.unroll(5):
                lower: T.int32 = hopper.shuffle(end, T.max(lane - (1 << i), 0))
                if lane >= (1 << i):
                    end = end + lower
            passed: T.int32 = T.cast(tiles_before + end <= block, "int32")
            for i in T.unroll(5):
                passed = passed + hopper.exchange(passed, 1 << i)
            if passed < 32:
                sequence = candidate + passed
                tile_in_sequence = block - tiles_before - hopper.shuffle(end - tiles, passed)
                candidate = batch
            else:
                tiles_before = tiles_before + hopper.shuffle(end, 31)
                candidate = candidate + 32
        # Equal in all lanes, which the compiler has to see: it serialises wgmma on paths that might diverge.
        sequence = hopper.shuffle(sequence, 0)
        tile_in_sequence = hopper.shuffle(tile_in_sequence, 0)

        if sequence < batch:
            first_row: T.int32 = q_indptr[sequence]
            row_count: T.int32 = q_indptr[sequence + 1] - first_row
            length: T.int32 = seq_lens[sequence]
            # The last rows see most: they start first.
            tile: T.int32 = (row_count + (tokens - 1)) // tokens - 1 - tile_in_sequence
            position: T.int32 = length - row_count + tile * tokens
            low: T.int32 = T.max(rules.first_visible(position), 0)
            first_tile: T.int32 = low // keys
            end_tile: T.int32 = (T.min(length, position + tokens) + (keys - 1)) // keys
            stage: T.int32 = 0
            phase: T.int32 = 0
            if warpgroup == 0:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](PRODUCER_REGISTERS)

                @T.inline
                def copy_pages(to, full, empty, row) -> None:
                    """A tile of keys or of values; ``row`` is that of this lane's page."""
                    T.cuda.mbarrier_wait(empty.ptr_to([stage]), phase ^ 1)
                    if lane == 0:
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(kv_bytes))
                    T.cuda.warp_sync()
                    if lane < tile_pages:
                        for a in T.unroll(atoms):
                            T.ptx[hopper.TMA_LOAD](
                                to.ptr_to([stage, a, lane * page_size, 0]), T.address_of(kv_map), a * hopper.ATOM, row,
                                full.ptr_to([stage]),
                            )  # fmt: skip

                if thread < 32:
                    if lane == 0:
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(q_full.ptr_to([0]), T.uint32(q_bytes))
                        for a in T.unroll(atoms):
                            T.ptx[hopper.TMA_LOAD_3D](
                                s_q.ptr_to([a, 0, 0]), T.address_of(q_map), a * hopper.ATOM, bundle * packed,
                                first_row + tile * tokens, q_full.ptr_to([0]),
                            )  # fmt: skip
                    key_tile: T.int32 = first_tile
                    while key_tile < end_tile:
                        # Pages before the first visible position or behind the last one may be anybody's: the nearest own one
                        # stands in, its scores are masked.
                        page: T.int32 = 0
                        if lane < tile_pages:
                            own: T.int32 = T.max(T.min(key_tile * tile_pages + lane, (length - 1) // page_size), low // page_size)
                            page = block_table[sequence, own]
                        row: T.int32 = (page * hk + bundle // bundles) * (2 * page_size)
                        copy_pages(s_k, k_full, k_empty, row)
                        copy_pages(s_v, v_full, v_empty, row + page_size)
                        stage = stage + 1
                        if stage == depth:
                            stage = 0
                            phase = phase ^ 1
                        key_tile = key_tile + 1
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](CONSUMER_REGISTERS[rows])
                s = T.alloc_local((scores,), "float32")
                o = T.alloc_local((values,), "float32")
                p = T.alloc_local((fragments,), "uint32")
                # Per row of the thread (lane // 4 and 8 more): the largest score, the one it is becoming, exp2 of their
                # difference, and the sum of the thread's own columns.
                largest = T.alloc_local((2,), "float32")
                shift = T.alloc_local((2,), "float32")
                decay = T.alloc_local((2,), "float32")
                total = T.alloc_local((2,), "float32")
                q_descriptor = T.alloc_local((1,), "uint64")
                k_descriptor = T.alloc_local((1,), "uint64")
                v_descriptor = T.alloc_local((1,), "uint64")
                group: T.int32 = warpgroup - 1
                local: T.int32 = thread % 128
                own_row: T.int32 = group * 64 + local // 32 * 16 + lane // 4
                positions = T.alloc_local((2,), "int32")
                for r in T.unroll(2):
                    positions[r] = position + (own_row + 8 * r) // packed
                T.cuda.wgmma.encode_matrix_descriptor(
                    T.address_of(q_descriptor[0]), s_q.ptr_to([0, group * 64, 0]), 1, 64, hopper.SWIZZLE_128B
                )
                T.cuda.wgmma.encode_matrix_descriptor(
                    T.address_of(k_descriptor[0]), s_k.ptr_to([0, 0, 0, 0]), 1, 64, hopper.SWIZZLE_128B
                )
                T.cuda.wgmma.encode_matrix_descriptor(
                    T.address_of(v_descriptor[0]), s_v.ptr_to([0, 0, 0, 0]), kv_atom_bytes // 16, 64, hopper.SWIZZLE_128B
                )

                @T.inline
                def multiply_qk(at) -> None:
                    for kk in T.unroll(d // 16):
                        T.ptx[qk_mma](
                            *[s[i] for i in range(scores)],
                            q_descriptor[0] + T.uint64(kk // 4 * (q_atom_bytes // 16) + kk % 4 * 2),
                            k_descriptor[0] + T.cast((at * kv_bytes + kk // 4 * kv_atom_bytes) // 16 + kk % 4 * 2, "uint64"),
                            T.bool(kk > 0), 1, 1, 0, 0,
                        )  # fmt: skip
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def multiply_pv(at) -> None:
                    for kk in T.unroll(keys // 16):
                        T.ptx[pv_mma](
                            *[o[i] for i in range(values)], p[kk * 4], p[kk * 4 + 1], p[kk * 4 + 2], p[kk * 4 + 3],
                            v_descriptor[0] + T.cast(at * (kv_bytes // 16) + kk * 128, "uint64"), T.bool(True), 1, 1, 1,
                        )  # fmt: skip
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def softmax(at) -> None:
                    """Scores of key tile ``at`` to weights, as the A operand of the next multiplication."""
                    if rules.capped:
                        cap(s, scores, rules)
                    mask(s, scores, rules, at * keys, position + group * 64 // packed, 63 // packed + 2, positions, lane)
                    accumulate(s, scores, rules, largest, shift, decay, total)

                @T.inline
                def pack() -> None:
                    for i in T.unroll(fragments):
                        T.ptx[to_pair](p[i], s[i * 2 + 1], s[i * 2])

                for i in T.unroll(values):
                    o[i] = T.float32(0)
                for r in T.unroll(2):
                    largest[r] = T.float32(MASKED)
                    total[r] = T.float32(0)
                v_stage: T.int32 = 0
                v_phase: T.int32 = 0
                T.cuda.mbarrier_wait(q_full.ptr_to([0]), 0)
                T.cuda.mbarrier_wait(k_full.ptr_to([0]), 0)
                T.ptx.wgmma.fence.sync.aligned()
                multiply_qk(0)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hopper.fence(s, scores)
                if local == 0:
                    T.ptx.mbarrier.arrive.shared.b64(k_empty.ptr_to([0]), T.uint32(1))
                softmax(first_tile)
                pack()
                stage = 1 % depth
                phase = 0 if depth > 1 else 1
                j: T.int32 = first_tile + 1
                while j < end_tile:
                    T.cuda.mbarrier_wait(k_full.ptr_to([stage]), phase)
                    hopper.fence(s, scores)
                    hopper.fence(o, values)
                    T.ptx.wgmma.fence.sync.aligned()
                    multiply_qk(stage)
                    T.cuda.mbarrier_wait(v_full.ptr_to([v_stage]), v_phase)
                    multiply_pv(v_stage)
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hopper.fence(s, scores)
                    if local == 0:
                        T.ptx.mbarrier.arrive.shared.b64(k_empty.ptr_to([stage]), T.uint32(1))
                    softmax(j)
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    hopper.fence(o, values)
                    if local == 0:
                        T.ptx.mbarrier.arrive.shared.b64(v_empty.ptr_to([v_stage]), T.uint32(1))
                    for i in T.unroll(values):
                        o[i] = o[i] * decay[i // 2 % 2]
                    pack()
                    v_stage = stage
                    v_phase = phase
                    stage = stage + 1
                    if stage == depth:
                        stage = 0
                        phase = phase ^ 1
                    j = j + 1
                T.cuda.mbarrier_wait(v_full.ptr_to([v_stage]), v_phase)
                hopper.fence(o, values)
                T.ptx.wgmma.fence.sync.aligned()
                multiply_pv(v_stage)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hopper.fence(o, values)
                for r in T.unroll(2):
                    total[r] = total[r] + hopper.exchange(total[r], 1)
                    total[r] = total[r] + hopper.exchange(total[r], 2)
                    if has_sinks:
                        # A sink is one more score without a value. Far above all scores it makes the sum infinite, the result 0.
                        T.ptx["ex2.approx.ftz.f32"](
                            decay[r],
                            T.cast(sinks[bundle * packed + (own_row + 8 * r) % packed], "float32") * T.float32(hopper.LOG2E)
                            - largest[r] * T.float32(rules.to_log2),
                        )
                        total[r] = total[r] + decay[r]
                    total[r] = T.float32(1) / total[r]
                for r in T.unroll(2):
                    token: T.int32 = (own_row + 8 * r) // packed
                    if token < tokens and tile * tokens + token < row_count:
                        to_row = T.meta_var(T.cast(first_row + tile * tokens + token, "int64"))
                        head = T.meta_var(bundle * packed + (own_row + 8 * r) % packed)
                        for i in T.unroll(d // 8):
                            T.ptx[to_pair](p[0], o[i * 4 + r * 2 + 1] * total[r], o[i * 4 + r * 2] * total[r])
                            T.ptx["st.global.b32"](out.ptr_to([to_row, head, i * 8 + lane % 4 * 2]), p[0])

    return hopper.finish(prefill, f"prefill_{hq}x{hk}x{d}", [] if has_sinks else ["sinks"], dependent_launch)
