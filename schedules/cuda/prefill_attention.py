"""``llmc.attend`` in the extend phase on sm_90a: flash attention over pages with TMA and wgmma, for rows of any raggedness.

A thread block takes 128 rows of one sequence: of a few tokens, all the query heads that share a KV head (a row is a token's
head, heads fastest), so that a step of single tokens needs a block for each KV head and not for each query head, and reads
their keys once. One warp copies: the tile of queries once, then keys and values tile by tile, each lane the boxes of one page.
Two warpgroups compute, 64 rows each: S = QK', online softmax in registers, O += PV with P from registers. QK' of tile j is issued
before PV of tile j - 1, so that the softmax runs while the tensor cores work (Shah et al., 2024, "FlashAttention-3").

A head is copied in boxes of 64 columns, what is behind its end as zeros, which no multiplication reads.

The grid is an upper bound made of n and b alone, ``n // tokens + b`` tiles: nothing is computed on the host, and every block
finds its rows in ``q_indptr``; blocks too many leave at once. Tokens behind ``q_indptr[b]`` (padding) are not written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.softmax_hopper import MASKED, Rules, accumulate, cap, mask
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

NAME = "cuda.prefill_attention"
OP = "llmc.attend"
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
ROWS = 128
"""Query rows of a thread block: 64 for each of two warpgroups."""

MAX_HEAD_DIM = 256
PAGE_SIZES = (8, 16, 32, 64)
"""A page's rows are whole swizzle periods of 8, and a key tile is made of whole pages."""

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


def _call(
    hq: int, hk: int, d: int, page_size: int = 16, dtype: str = "bfloat16", phase: str = "extend", **attrs: Any
) -> KernelCall:
    full = {"scale": d**-0.5, "window": -1, "chunk": -1, "softcap": 0.0, "sinks": 0, "page_size": page_size, "v_dim": d, **attrs}
    args = [
        TensorSpec(("n", hq, d), dtype),
        TensorSpec(("num_pages", hk, page_size * 2 * d), dtype),
        TensorSpec(("b", "m"), "int32"),
        TensorSpec(("b",), "int32"),
        TensorSpec(("b+1",), "int32"),
    ]
    if full["sinks"]:
        args.append(TensorSpec((hq,), dtype))
    return KernelCall(OP, tuple(args), TensorSpec(("n", hq, d), dtype), tuple(sorted(full.items())), phase)


SHAPES: dict[str, KernelCall] = {
    "gqa_32x8x128": _call(32, 8, 128),
    "gqa_32x8x64_p64": _call(32, 8, 64, page_size=64),
    "small_2x1x128": _call(2, 1, 128),
    "small_3x3x64_f16": _call(3, 3, 64, page_size=32, dtype="float16"),
    "window_2x1x128": _call(2, 1, 128, window=100),
    "softcap_2x2x64": _call(2, 2, 64, softcap=5.0, page_size=64),
    "softcap_window_1x1x256": _call(1, 1, 256, softcap=30.0, window=33),
    "sinks_4x2x64": _call(4, 2, 64, sinks=1, page_size=8, window=70),
    "chunked_2x1x128_f16": _call(2, 1, 128, chunk=48, dtype="float16"),
    "small_1x1x192": _call(1, 1, 192, page_size=64),
    "group_3_80": _call(6, 2, 80, page_size=32),
    "group_8_96_f16": _call(8, 1, 96, dtype="float16"),
    "group_7_48_window": _call(7, 1, 48, window=40, sinks=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not hopper.is_hopper(target) or call.phase != "extend":
        return None
    q, pages = call.args[:2]
    hq, d = q.shape[1:]
    hk, page_size = pages.shape[1], int(call.attr("page_size"))
    if not isinstance(d, int) or d % 16 or d > MAX_HEAD_DIM or d != call.attr("v_dim") or not isinstance(hq, int) or not isinstance(hk, int) or hq % hk:
        return None
    if q.dtype not in hopper.PTX_TYPE or {pages.dtype, call.result.dtype} != {q.dtype}:
        return None
    if page_size not in PAGE_SIZES or call.attr("scale") <= 0 or any(s.dtype not in WIDTH for s in call.args[5:]):
        return None
    heads = packed_heads(hq // hk)
    return f"{q.dtype} tensor cores (wgmma), online softmax, {heads} heads share their keys, {page_size}-position pages by TMA"


def packed_heads(group: int) -> int:
    """How many of the ``group`` query heads of a KV head share a tile: the most, up to 16, that leave few of its rows empty."""
    return max(h for h in range(1, 17) if group % h == 0 and ROWS // h * h >= ROWS - 8)


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``keys``: positions of a key tile; ``stages``: tiles of keys, and of values, in shared memory."""
    d = int(call.args[0].shape[2])
    keys = [128, 64] if d <= 128 else [64]
    return {"keys": keys, "stages": [2], "dependent_launch": [True, False]}


def _names(call: KernelCall) -> list[str]:
    return ["q", "kv_pages", "block_table", "seq_lens", "q_indptr", *(["sinks"] if call.attr("sinks") else [])]


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    specs = dict(zip(_names(call), call.args, strict=True))
    hq, d = (int(v) for v in specs["q"].shape[1:])
    hk, page_size = int(specs["kv_pages"].shape[1]), int(call.attr("page_size"))
    dtype, has_sinks = specs["q"].dtype, "sinks" in specs
    sinks_dtype = specs["sinks"].dtype if has_sinks else dtype
    rules = Rules(*(call.attr(name) for name in ("scale", "softcap", "window", "chunk")))
    keys, depth, dependent_launch = int(config["keys"]), int(config["stages"]), bool(config["dependent_launch"])

    packed = packed_heads(hq // hk)
    tokens, bundles = ROWS // packed, hq // hk // packed
    tile_pages, atoms = keys // page_size, -(-d // hopper.ATOM)
    q_atom_bytes, kv_atom_bytes = ROWS * 128, keys * 128
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
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        bundle, block = T.cta_id([hq // packed, T.cast(n // tokens + b, "int32")])
        thread = T.thread_id([384])
        pool = T.SMEMPool()
        s_q = pool.alloc((atoms, ROWS, hopper.ATOM), dtype, align=1024)
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
                T.ptx.mbarrier.init.shared.b64(k_empty.ptr_to([i]), T.uint32(2))
                T.ptx.mbarrier.init.shared.b64(v_empty.ptr_to([i]), T.uint32(2))
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
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](CONSUMER_REGISTERS)
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
                            T.cast(sinks[bundle * packed + (own_row + 8 * r) % packed], "float32") * T.float32(hopper.LOG2E) - largest[r] * T.float32(rules.to_log2),
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


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    from llmc.dialect.paged import attend_reference

    return attend_reference(*arrays, **{name: value for name, value in call.attrs if name != "sinks"})


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """``context``: positions of each of the b sequences. Every one is read once; every row is multiplied by all it may see.

    The n rows are the last n / b of each sequence, so row i of r sees context - r + i + 1 positions, at most a window.
    """
    n, hq, d = call.args[0].bind(symbols)
    batch, context, window = symbols["b"], symbols["context"], int(call.attr("window"))
    rows = n // batch
    seen = np.arange(context - rows + 1, context + 1)
    pairs = batch * int((np.minimum(seen, window) if window > 0 else seen).sum())
    cache = batch * context * int(call.args[1].shape[1]) * 2 * d
    return WIDTH[call.args[0].dtype] * (cache + 2 * n * hq * d), 4 * pairs * hq * d
