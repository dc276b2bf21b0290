"""How rows reach their experts and come back on sm_90a: sorting the pairs of a row and an expert, copying rows, summing results.

A *pair* is ``row * top_k + j``. Pairs of one expert become neighbours, so that a matrix is read once for all of them; everything is
counted on the device, and grids are upper bounds made of the number of rows alone.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper

THREADS = 1024
COPY_THREADS = 128
LANES = 8
"""16-bit values of a 16-byte access."""

MOST_EXPERTS = 1024


def tile_bound(pairs: Any, experts: int, rows: int) -> Any:
    """Tiles of ``rows`` that ``pairs`` pairs may need: every expert may have one that is not full."""
    return T.min(pairs, pairs // rows + experts)


def sort(experts: int, top_k: int, rows: int, dependent_launch: bool) -> Any:
    """``sort(ids [n, top_k], position [pairs], tiles [m, 3])``, int32: where each pair's row goes, and the tiles of up to ``rows``
    rows of one expert: (expert, first row, end of the expert's rows), then zeros.

    Which of an expert's pairs comes first depends on timing; no result does.
    """

    @T.prim_func
    def sort_pairs(ids_ptr: T.handle, position_ptr: T.handle, tiles_ptr: T.handle) -> None:
        n = T.int64()
        pairs = T.int64()
        m = T.int64()
        ids = T.match_buffer(ids_ptr, (n, top_k), "int32", align=4)
        position = T.match_buffer(position_ptr, (pairs,), "int32", align=4)
        tiles = T.match_buffer(tiles_ptr, (m, 3), "int32", align=4)
        T.device_entry()
        block = T.cta_id([1])  # noqa: F841
        thread = T.thread_id([THREADS])
        pool = T.SMEMPool()
        s_count = pool.alloc((experts,), "uint32", align=16)
        s_first = pool.alloc((experts,), "int32", align=16)
        s_tiles = pool.alloc((1,), "int32", align=16)
        pool.commit()
        place = T.alloc_local((1,), "uint32")
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        count: T.int32 = T.cast(n, "int32") * top_k
        if thread < experts:
            s_count[thread] = T.uint32(0)
        T.cuda.cta_sync()
        item: T.int32 = thread
        while item < count:
            T.ptx["atom.shared.add.u32"](place[0], s_count.ptr_to([ids[item // top_k, item % top_k]]), T.uint32(1))
            position[item] = T.cast(place[0], "int32")
            item = item + THREADS
        T.cuda.cta_sync()
        if thread < experts:
            before: T.int32 = 0
            tile: T.int32 = 0
            other: T.int32 = 0
            while other < thread:
                before = before + T.cast(s_count[other], "int32")
                tile = tile + (T.cast(s_count[other], "int32") + (rows - 1)) // rows
                other = other + 1
            end: T.int32 = before + T.cast(s_count[thread], "int32")
            s_first[thread] = before
            while before < end:
                tiles[tile, 0] = thread
                tiles[tile, 1] = before
                tiles[tile, 2] = end
                tile = tile + 1
                before = before + rows
            if thread == experts - 1:
                s_tiles[0] = tile
        T.cuda.cta_sync()
        unused: T.int32 = s_tiles[0] + thread
        while unused < T.cast(m, "int32"):
            for i in T.unroll(3):
                tiles[unused, i] = 0
            unused = unused + THREADS
        item = thread
        while item < count:
            position[item] = position[item] + s_first[ids[item // top_k, item % top_k]]
            item = item + THREADS

    return hopper.finish(sort_pairs, f"moe_sort_{experts}", (), dependent_launch)


def scatter(h: int, top_k: int, dtype: str, dependent_launch: bool) -> Any:
    """``scatter(x [n, h], position [pairs], sorted [pairs, h])``: every row to the places of its pairs."""

    @T.prim_func
    def scatter_rows(x_ptr: T.handle, position_ptr: T.handle, sorted_ptr: T.handle) -> None:
        n = T.int64()
        pairs = T.int64()
        x = T.match_buffer(x_ptr, (n, h), dtype, align=16)
        position = T.match_buffer(position_ptr, (pairs,), "int32", align=4)
        to = T.match_buffer(sorted_ptr, (pairs, h), dtype, align=16)
        T.device_entry()
        row = T.cta_id([T.cast(n, "int32")])
        thread = T.thread_id([COPY_THREADS])
        words = T.alloc_local((4,), "uint32")
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        column: T.int32 = thread * LANES
        while column < h:
            T.ptx["ld.global.v4.b32"](words[0], words[1], words[2], words[3], x.ptr_to([row, column]))
            for j in T.unroll(top_k):
                T.ptx["st.global.v4.b32"](to.ptr_to([position[row * top_k + j], column]), words[0], words[1], words[2], words[3])
            column = column + COPY_THREADS * LANES

    return hopper.finish(scatter_rows, f"moe_scatter_{h}", (), dependent_launch)


def gather(h: int, top_k: int, dtype: str, weight_dtype: str, dependent_launch: bool) -> Any:
    """``gather(weights [n, top_k], position [pairs], sorted [pairs, h], out [n, h])``: the weighted sum over a row's pairs."""
    to_pair = hopper.packed_convert(dtype)

    @T.prim_func
    def gather_rows(weights_ptr: T.handle, position_ptr: T.handle, sorted_ptr: T.handle, out_ptr: T.handle) -> None:
        n = T.int64()
        pairs = T.int64()
        weights = T.match_buffer(weights_ptr, (n, top_k), weight_dtype, align=4)
        position = T.match_buffer(position_ptr, (pairs,), "int32", align=4)
        parts = T.match_buffer(sorted_ptr, (pairs, h), dtype, align=16)
        out = T.match_buffer(out_ptr, (n, h), dtype, align=16)
        T.device_entry()
        row = T.cta_id([T.cast(n, "int32")])
        thread = T.thread_id([COPY_THREADS])
        words = T.alloc_local((4,), "uint32")
        total = T.alloc_local((LANES,), "float32")
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        column: T.int32 = thread * LANES
        while column < h:
            for i in T.unroll(LANES):
                total[i] = T.float32(0)
            for j in T.unroll(top_k):
                T.ptx["ld.global.v4.b32"](
                    words[0], words[1], words[2], words[3], parts.ptr_to([position[row * top_k + j], column])
                )  # fmt: skip
                for i in T.unroll(LANES):
                    half = T.meta_var(T.cast(T.shift_right(words[i // 2], T.uint32(16 * (i % 2))), "uint16"))
                    total[i] = total[i] + T.cast(weights[row, j], "float32") * T.cast(T.reinterpret(dtype, half), "float32")
            for i in T.unroll(4):
                T.ptx[to_pair](words[i], total[i * 2 + 1], total[i * 2])
            T.ptx["st.global.v4.b32"](out.ptr_to([row, column]), words[0], words[1], words[2], words[3])
            column = column + COPY_THREADS * LANES

    return hopper.finish(gather_rows, f"moe_gather_{h}", (), dependent_launch)
