"""The vocabulary of the simple CUDA kernels: thread blocks, 16-byte loads and warp reductions over TVM's IRBuilder.

Kernels are Python functions that *emit* TIR for one thread; Python loops unroll. Values are float32 in registers whatever
their storage dtype. The code is portable: no instruction newer than sm_80.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Symbols, arguments, bind, ceildiv, f32, function, i64, read, store, when

__all__ = [
    "STORAGE", "WARP", "WIDTH", "Symbols", "arguments", "bind", "block_sum", "ceildiv", "common_lanes", "each", "f32", "flat",
    "function", "i64", "lane_max", "launch", "load", "read", "registers", "shared", "store", "store_all", "vector_lanes",
    "warp_sum", "when",
]  # fmt: skip

Expr = Any
WARP = 32
STORAGE = ("float32", "float16", "bfloat16")
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element."""

_FULL_WARP = 0xFFFFFFFF
_VECTOR_BYTES = 16


@contextmanager
def launch(blocks: Expr, threads: int, *more_blocks: Expr) -> Iterator[tuple[Expr, ...]]:
    """A grid of ``blocks`` thread blocks (``more_blocks``: along y and z) of ``threads`` threads.

    Yields the thread's index (int32) and the block's indices (int64).
    """
    axes = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
    extents = (blocks, *more_blocks)

    def nest(level: int, indices: list[Expr]) -> Iterator[tuple[Expr, ...]]:
        if level == len(extents):
            with T.launch_thread("threadIdx.x", threads) as thread:
                yield (thread, *(i64(i) for i in indices))
            return
        with T.launch_thread(axes[level], extents[level]) as index:
            yield from nest(level + 1, [*indices, index])

    yield from nest(0, [])


def flat(count: Expr, body: Callable[[Expr], None], threads: int = 256) -> None:
    """Run ``body(i)`` (i int64) for i < count, one thread each."""
    with launch(ceildiv(count, threads), threads) as (thread, block):
        i = bind(block * threads + i64(thread))
        when(i < count, lambda: body(i))


def vector_lanes(dtype: str, *counts: int) -> int:
    """Elements of the widest load (16 bytes at most) that divides all of ``counts``: row lengths, offsets."""
    return gcd(_VECTOR_BYTES // WIDTH[dtype], *counts)


def common_lanes(dtypes: Sequence[str], *counts: int) -> int:
    """The same for values in several dtypes: the widest dtype decides."""
    return min(vector_lanes(d, *counts) for d in dtypes)


def registers(count: int, dtype: str = "float32") -> Expr:
    """A thread's own array. Indexed by constants only (unrolled loops), it lives in registers."""
    return T.alloc_buffer((count,), dtype, scope="local")


def shared(count: int, dtype: str = "float32") -> Expr:
    """An array of the thread block."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def load(buffer: Expr, *index: Expr, lanes: int = 1) -> list[Expr]:
    """``lanes`` consecutive elements as float32, by one load; the last index is a multiple of ``lanes``."""
    if lanes == 1:
        return [bind(_to_float(buffer[index]))]
    held = registers(lanes, str(buffer.ty.dtype))
    store(held, read(buffer, *index, lanes=lanes), 0, lanes=lanes)
    return [_to_float(held[i]) for i in range(lanes)]


def store_all(buffer: Expr, values: Sequence[Expr], *index: Expr) -> None:
    """Store float32 values to consecutive elements, each rounded once to the buffer's dtype, by one store."""
    dtype = str(buffer.ty.dtype)
    if len(values) == 1:
        store(buffer, _from_float(values[0], dtype), *index)
        return
    held = registers(len(values), dtype)
    for i, value in enumerate(values):
        store(held, _from_float(value, dtype), i)
    store(buffer, read(held, 0, lanes=len(values)), *index, lanes=len(values))


def each(thread: Expr, threads: int, count: int, body: Callable[[Expr, int], None]) -> None:
    """Share ``count`` items out to ``threads`` threads, unrolled: ``body(item, step)`` for item = step * threads + thread."""
    for step in range(-(-count // threads)):
        item = bind(i64(thread) + step * threads)
        if (step + 1) * threads <= count:
            body(item, step)
        else:
            when(item < count, lambda item=item, step=step: body(item, step))  # type: ignore[misc]


def warp_sum(value: Expr, lanes: int = WARP) -> Expr:
    """The sum over groups of ``lanes`` (a power of two) neighbouring threads, in every one of them. All threads must take part."""
    total = registers(1)
    store(total, value, 0)
    distance = lanes // 2
    while distance:
        store(total, total[0] + _exchange(total[0], distance), 0)
        distance //= 2
    return bind(total[0])


def block_sum(value: Expr, thread: Expr, threads: int) -> Expr:
    """The sum over a whole thread block, in every thread. May be called more than once in a kernel."""
    if threads <= WARP:
        return warp_sum(value, threads)
    parts = shared(threads // WARP)
    total = warp_sum(value)
    when(tirx.floormod(thread, WARP).equal(0), lambda: store(parts, total, tirx.floordiv(thread, WARP)))
    T.evaluate(T.tvm_storage_sync("shared"))
    result = parts[0]
    for warp in range(1, threads // WARP):
        result = result + parts[warp]
    return bind(result)


def lane_max(value: Expr, index: Expr, lanes: int = WARP) -> tuple[Expr, Expr]:
    """The largest value of a warp and its index, the lowest among equals, in every thread."""
    best, where = registers(1), registers(1, "int32")
    store(best, value, 0)
    store(where, index, 0)
    distance = lanes // 2
    while distance:
        other, other_where = bind(_exchange(best[0], distance)), bind(_exchange(where[0], distance))
        better = tirx.any(other > best[0], tirx.all(other.equal(best[0]), other_where < where[0]))

        def take(other: Expr = other, other_where: Expr = other_where) -> None:
            store(best, other, 0)
            store(where, other_where, 0)

        when(better, take)
        distance //= 2
    return bind(best[0]), bind(where[0])


def _exchange(value: Expr, distance: int) -> Expr:
    return T.tvm_warp_shuffle_xor(tirx.const(_FULL_WARP, "uint32"), value, distance, WARP, WARP)


def _to_float(value: Expr) -> Expr:
    return value if str(value.ty.dtype) == "float32" else tirx.Cast("float32", value)


def _from_float(value: Expr, dtype: str) -> Expr:
    return value if dtype == "float32" else tirx.Cast(dtype, value)
