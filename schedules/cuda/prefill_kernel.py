"""Flash attention over pages with TMA and wgmma on sm_90a, for rows of any raggedness: the kernel of :mod:`.prefill_attention`.

A tile is 128 (or 64) rows of one sequence: of a few tokens, all the query heads that share a KV head (a row is a token's head,
heads fastest), so that a step of single tokens needs a tile for each KV head and not for each query head, and reads their keys
once. Thread blocks stay on their multiprocessors and work through tiles, in every sequence the last first, which see most. They
take them in turns, from the first block to the last and then back, so that all get as much.

One warp of a block copies: the queries of a tile and what there is to know about it, then keys and values tile by tile, each lane
the boxes of one page; it is a tile ahead of the others where there is room. Two blocks of a cluster may take neighbouring tiles
and fetch half of the keys and values each, for both. Two warpgroups (or one) of a block compute, 64 rows each: S = QK', online
softmax in registers, O += PV with P from registers. QK' of tile j is issued before PV of tile j - 1, so that the softmax
runs while the tensor cores work, and the warpgroups may do so in turns (Shah et al., 2024, "FlashAttention-3"). Queries are in
registers where there is room for them: shared memory then has only keys to bring to the tensor cores in QK', and bringing both is
about all it can do while more are copied to it.

A head is copied in boxes of 64 columns, what is behind its end as zeros, which no multiplication reads.

The number of tiles is an upper bound made of n and b alone: nothing is computed on the host, and every block finds its rows in
``q_indptr``. Tokens behind ``q_indptr[b]`` (padding) are not written.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper, prefill_tiles
from llmc.schedules.cuda.prefill_tiles import Choices, Shape, packed_heads
from llmc.schedules.cuda.softmax_hopper import MASKED, Rules, accumulate, cap, mask, reciprocals, rescale
from llmc.schedules.protocol import KernelCall

PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = {128: 232, 64: 216}
"""By query rows of a tile. Together they are what a block starts with, 168 or 128 to a thread: for more it would wait forever."""

MOST_REGISTERS = 192
"""For scores, weights, sums and queries, up to which queries are in registers."""

TURN_BARRIER = 2
"""The first of the two barriers at which warpgroups wait for their turns."""


def kernel(call: KernelCall, shape: Shape, choices: Choices) -> Any:
    """The PrimFunc of ``call``. ``share`` pages are at most a tile of keys."""
    rows, keys, share = shape
    depth, blocks = choices.stages, choices.blocks * 128 // rows
    hq, d = (int(v) for v in call.args[0].shape[1:])
    hk, page_size = int(call.args[1].shape[1]), int(call.attr("page_size"))
    dtype, has_sinks = call.args[0].dtype, bool(call.attr("sinks"))
    sinks_dtype = call.args[5].dtype if has_sinks else dtype
    rules = Rules(*(call.attr(name) for name in ("scale", "softcap", "window", "chunk")))
    packed = packed_heads(hq // hk, rows)
    tokens, bundles, groups = rows // packed, hq // packed, rows // 64
    # Tokens of the tiles of a cluster, and pages of a tile of keys that one of its blocks fetches.
    span, fetched = tokens * share, keys // page_size // share
    atoms, clusters = -(-d // hopper.ATOM), blocks // share
    q_atom_bytes, kv_atom_bytes = rows * 128, keys * 128
    q_bytes, kv_bytes = tokens * packed * 128 * atoms, kv_atom_bytes * atoms
    scores, values, fragments = keys // 2, d // 2, keys // 4
    held = scores + values + fragments + d // 4 <= MOST_REGISTERS
    lazy, turns, dependent_launch = choices.lazy, choices.turns and groups > 1, choices.dependent_launch
    types = f"f32.{hopper.PTX_TYPE[dtype]}.{hopper.PTX_TYPE[dtype]}"
    qk_mma = f"wgmma.mma_async.sync.aligned.m64n{keys}k16.{types}"
    pv_mma = f"wgmma.mma_async.sync.aligned.m64n{d}k16.{types}"
    to_pair = hopper.packed_convert(dtype)

    @T.prim_func
    def prefill(
        q_ptr: T.handle, kv_pages_ptr: T.handle, block_table_ptr: T.handle, seq_lens_ptr: T.handle, q_indptr_ptr: T.handle,
        sinks_ptr: T.handle, out_ptr: T.handle,
    ) -> None:  # fmt: skip
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
        if share > 1:
            rank = T.cta_id_in_cluster([share])
        block = T.cta_id([blocks])
        thread = T.thread_id([128 + 2 * rows])
        pool = T.SMEMPool()
        s_q = pool.alloc((atoms, rows, hopper.ATOM), dtype, align=1024)
        s_k = pool.alloc((depth, atoms, keys, hopper.ATOM), dtype, align=1024)
        s_v = pool.alloc((depth, atoms, keys, hopper.ATOM), dtype, align=1024)
        # Of the tile whose queries are in s_q: its first row of q, how many tokens of its sequence there are from it on, the
        # position of the first token of the cluster's tiles, the sequence's length (0: there is no tile), and the bundle of heads.
        about = pool.alloc((5,), "int32", align=16)
        q_full = pool.alloc((1,), "uint64", align=8)
        q_empty = pool.alloc((1,), "uint64", align=8)
        k_full = pool.alloc((depth,), "uint64", align=8)
        v_full = pool.alloc((depth,), "uint64", align=8)
        k_empty = pool.alloc((depth,), "uint64", align=8)
        v_empty = pool.alloc((depth,), "uint64", align=8)
        pool.commit()
        warpgroup: T.int32 = hopper.shuffle(thread // 128, 0)
        lane: T.int32 = thread % 32
        member: T.int32 = 0
        if share > 1:
            member = rank
        if thread == 0:
            T.ptx.mbarrier.init.shared.b64(q_full.ptr_to([0]), T.uint32(1))
            T.ptx.mbarrier.init.shared.b64(q_empty.ptr_to([0]), T.uint32(128 * groups))
            for i in T.unroll(depth):
                T.ptx.mbarrier.init.shared.b64(k_full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(v_full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(k_empty.ptr_to([i]), T.uint32(groups * share))
                T.ptx.mbarrier.init.shared.b64(v_empty.ptr_to([i]), T.uint32(groups * share))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()
        if share > 1:
            T.cuda.cluster_sync()
        else:
            T.cuda.cta_sync()
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        stage: T.int32 = 0
        phase: T.int32 = 0
        q_phase: T.int32 = 0

        if warpgroup == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](PRODUCER_REGISTERS)

            @T.inline
            def copy_pages(to, full, empty, row) -> None:
                """This block's part of a tile of keys or of values; ``row`` is that of this lane's page."""
                T.cuda.mbarrier_wait(empty.ptr_to([stage]), phase ^ 1)
                if lane == 0:
                    T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(kv_bytes))
                T.cuda.warp_sync()
                if lane < fetched:
                    for a in T.unroll(atoms):
                        if share > 1:
                            T.ptx[hopper.TMA_LOAD + ".multicast::cluster"](
                                to.ptr_to([stage, a, (member * fetched + lane) * page_size, 0]), T.address_of(kv_map),
                                a * hopper.ATOM, row, full.ptr_to([stage]), (1 << share) - 1,
                            )  # fmt: skip
                        else:
                            T.ptx[hopper.TMA_LOAD](
                                to.ptr_to([stage, a, lane * page_size, 0]), T.address_of(kv_map), a * hopper.ATOM, row,
                                full.ptr_to([stage]),
                            )  # fmt: skip

            if thread < 32:
                found = T.alloc_local((2,), "int32")
                batch: T.int32 = T.cast(b, "int32")
                most: T.int32 = T.cast(n // span + b, "int32") * bundles
                round: T.int32 = 0
                item: T.int32 = block // share
                while item < most:
                    prefill_tiles.find(found, item // bundles, q_indptr, batch, span, lane)
                    sequence: T.int32 = found[0]
                    heads: T.int32 = item % bundles
                    # Behind a tile that no sequence has are no more.
                    item = most
                    if sequence < batch:
                        rows_before: T.int32 = q_indptr[sequence]
                        row_count: T.int32 = q_indptr[sequence + 1] - rows_before
                        positions_held: T.int32 = seq_lens[sequence]
                        tile: T.int32 = ((row_count + (span - 1)) // span - 1 - found[1]) * share
                        start: T.int32 = positions_held - row_count + tile * tokens
                        first_token: T.int32 = (tile + member) * tokens
                        T.cuda.mbarrier_wait(q_empty.ptr_to([0]), q_phase ^ 1)
                        if lane == 0:
                            about[0] = rows_before + first_token
                            about[1] = row_count - first_token
                            about[2] = start
                            about[3] = positions_held
                            about[4] = heads
                            T.ptx.mbarrier.arrive.expect_tx.shared.b64(q_full.ptr_to([0]), T.uint32(q_bytes))
                            for a in T.unroll(atoms):
                                T.ptx[hopper.TMA_LOAD_3D](
                                    s_q.ptr_to([a, 0, 0]), T.address_of(q_map), a * hopper.ATOM, heads * packed,
                                    rows_before + first_token, q_full.ptr_to([0]),
                                )  # fmt: skip
                        q_phase = q_phase ^ 1
                        low: T.int32 = T.max(rules.first_visible(start), 0)
                        key_tiles: T.int32 = (T.min(positions_held, start + span) + (keys - 1)) // keys
                        key_tile: T.int32 = low // keys
                        while key_tile < key_tiles:
                            # Pages before the first visible position or behind the last one may be anybody's: the nearest own one
                            # stands in, its scores are masked.
                            page: T.int32 = 0
                            if lane < fetched:
                                own: T.int32 = T.max(
                                    T.min((key_tile * share + member) * fetched + lane, (positions_held - 1) // page_size),
                                    low // page_size,
                                )
                                page = block_table[sequence, own]
                            row: T.int32 = (page * hk + heads * packed * hk // hq) * (2 * page_size)
                            copy_pages(s_k, k_full, k_empty, row)
                            copy_pages(s_v, v_full, v_empty, row + page_size)
                            stage = stage + 1
                            if stage == depth:
                                stage = 0
                                phase = phase ^ 1
                            key_tile = key_tile + 1
                        round = round + 1
                        item = round * clusters + T.if_then_else(round % 2 == 0, block // share, clusters - 1 - block // share)
                T.cuda.mbarrier_wait(q_empty.ptr_to([0]), q_phase ^ 1)
                if lane == 0:
                    about[3] = 0
                    T.ptx.mbarrier.arrive.shared.b64(q_full.ptr_to([0]), T.uint32(1))
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](CONSUMER_REGISTERS[rows])
            s = T.alloc_local((scores,), "float32")
            o = T.alloc_local((values,), "float32")
            p = T.alloc_local((fragments,), "uint32")
            held_q = T.alloc_local((d // 4 if held else 4,), "uint32")
            # Per row of the thread (lane // 4 and 8 more): the largest score, the one it is becoming, exp2 of their difference, and
            # the sum of the thread's own columns.
            largest = T.alloc_local((2,), "float32")
            shift = T.alloc_local((2,), "float32")
            decay = T.alloc_local((2,), "float32")
            total = T.alloc_local((2,), "float32")
            q_descriptor = T.alloc_local((1,), "uint64")
            k_descriptor = T.alloc_local((1,), "uint64")
            v_descriptor = T.alloc_local((1,), "uint64")
            remote = T.alloc_local((1,), "uint32")
            positions = T.alloc_local((2,), "int32")
            group: T.int32 = warpgroup - 1
            local: T.int32 = thread % 128
            own_row: T.int32 = group * 64 + local // 32 * 16 + lane // 4
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
            def release(empty, at) -> None:
                """One arrival per computing warpgroup in every block of the cluster."""
                hopper.release(empty, at, share, local, local, remote)

            @T.inline
            def release_queries() -> None:
                """Every thread for itself: all have read what there is to know about the tile."""
                T.ptx.mbarrier.arrive.shared.b64(q_empty.ptr_to([0]), T.uint32(1))

            @T.inline
            def await_turn() -> None:
                if turns:
                    T.ptx.bar.sync(T.cast(TURN_BARRIER + group, "uint32"), T.uint32(256))

            @T.inline
            def pass_turn() -> None:
                if turns:
                    T.ptx.bar.arrive(T.cast(TURN_BARRIER + 1 - group, "uint32"), T.uint32(256))

            @T.inline
            def multiply_qk(at) -> None:
                for kk in T.unroll(d // 16):
                    k_at = T.meta_var(
                        k_descriptor[0] + T.cast((at * kv_bytes + kk // 4 * kv_atom_bytes) // 16 + kk % 4 * 2, "uint64")
                    )
                    if held:
                        T.ptx[qk_mma](
                            *[s[i] for i in range(scores)],
                            held_q[kk * 4], held_q[kk * 4 + 1], held_q[kk * 4 + 2], held_q[kk * 4 + 3],
                            k_at, T.bool(kk > 0), 1, 1, 0,
                        )  # fmt: skip
                    else:
                        T.ptx[qk_mma](
                            *[s[i] for i in range(scores)],
                            q_descriptor[0] + T.cast(kk // 4 * q_atom_bytes // 16 + kk % 4 * 2, "uint64"),
                            k_at, T.bool(kk > 0), 1, 1, 0, 0,
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
            def softmax(at, position) -> None:
                """Scores of key tile ``at`` to weights, as the A operand of the next multiplication."""
                if rules.capped:
                    cap(s, scores, rules)
                mask(s, scores, rules, at * keys, position + group * 64 // packed, 63 // packed + 2, positions, lane)
                accumulate(s, scores, rules, largest, shift, decay, total, lazy)

            @T.inline
            def pack() -> None:
                for i in T.unroll(fragments):
                    T.ptx[to_pair](p[i], s[i * 2 + 1], s[i * 2])

            if turns and group == 1:
                T.ptx.bar.arrive(T.uint32(TURN_BARRIER), T.uint32(256))
            T.cuda.mbarrier_wait(q_full.ptr_to([0]), 0)
            # Equal in all lanes, which the compiler has to see: it serialises wgmma on paths that might diverge.
            length: T.int32 = hopper.shuffle(about[3], 0)
            while length > 0:
                first_row: T.int32 = hopper.shuffle(about[0], 0)
                left: T.int32 = hopper.shuffle(about[1], 0)
                first_position: T.int32 = hopper.shuffle(about[2], 0)
                bundle: T.int32 = hopper.shuffle(about[4], 0)
                position: T.int32 = first_position + member * tokens
                j: T.int32 = T.max(rules.first_visible(first_position), 0) // keys
                end_tile: T.int32 = (T.min(length, first_position + span) + (keys - 1)) // keys
                if held:
                    prefill_tiles.load_queries(held_q, s_q, group * 64 + local // 32 * 16, d, lane)
                    release_queries()
                for r in T.unroll(2):
                    positions[r] = position + (own_row + 8 * r) // packed
                    largest[r] = T.float32(MASKED)
                    total[r] = T.float32(0)
                for i in T.unroll(values):
                    o[i] = T.float32(0)
                T.cuda.mbarrier_wait(k_full.ptr_to([stage]), phase)
                hopper.fence(s, scores)
                await_turn()
                T.ptx.wgmma.fence.sync.aligned()
                multiply_qk(stage)
                pass_turn()
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hopper.fence(s, scores)
                release(k_empty, stage)
                softmax(j, position)
                pack()
                v_stage: T.int32 = stage
                v_phase: T.int32 = phase
                stage = stage + 1
                if stage == depth:
                    stage = 0
                    phase = phase ^ 1
                j = j + 1
                while j < end_tile:
                    T.cuda.mbarrier_wait(k_full.ptr_to([stage]), phase)
                    hopper.fence(s, scores)
                    hopper.fence(o, values)
                    T.cuda.mbarrier_wait(v_full.ptr_to([v_stage]), v_phase)
                    await_turn()
                    T.ptx.wgmma.fence.sync.aligned()
                    multiply_qk(stage)
                    multiply_pv(v_stage)
                    pass_turn()
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hopper.fence(s, scores)
                    release(k_empty, stage)
                    softmax(j, position)
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    hopper.fence(o, values)
                    release(v_empty, v_stage)
                    rescale(o, values, decay, lazy)
                    pack()
                    v_stage = stage
                    v_phase = phase
                    stage = stage + 1
                    if stage == depth:
                        stage = 0
                        phase = phase ^ 1
                    j = j + 1
                if not held:
                    release_queries()
                T.cuda.mbarrier_wait(v_full.ptr_to([v_stage]), v_phase)
                hopper.fence(o, values)
                T.ptx.wgmma.fence.sync.aligned()
                multiply_pv(v_stage)
                reciprocals(total, largest, decay, rules, sinks if has_sinks else None, bundle * packed, own_row, packed)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hopper.fence(o, values)
                release(v_empty, v_stage)
                prefill_tiles.store(out, o, total, p, to_pair, first_row, left, bundle * packed, own_row, packed, tokens, d, lane)
                q_phase = q_phase ^ 1
                T.cuda.mbarrier_wait(q_full.ptr_to([0]), q_phase)
                length = hopper.shuffle(about[3], 0)
        if share > 1:
            # No block may leave while its neighbour still multicasts into its shared memory or arrives at its barriers.
            T.cuda.cluster_sync()

    return hopper.finish(prefill, f"prefill_{hq}x{hk}x{d}", [] if has_sinks else ["sinks"], dependent_launch)
