"""The vocabulary of the portable GPU kernels: thread blocks, vector loads, and sums over groups of threads.

Kernels are Python functions that *emit* TIR for one thread; Python loops unroll. Values are float32 in registers whatever
their storage dtype. What differs between GPUs comes from :class:`~llmc.targets.base.GpuTarget`, as numbers: the warp, the vector
width, whether the threads of a warp can exchange registers. No kernel asks which GPU it is.
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

from llmc.schedules.cpu.emit import Symbols, arguments, bind, ceildiv, f32, function, i64, read, store, vector, when
from llmc.schedules.kv_pages import stored_as
from llmc.schedules.protocol import KernelCall
from llmc.targets import dependent_launch
from llmc.targets.base import GpuTarget, Target

__all__ = [
    "STORAGE", "WIDTH", "Symbols", "Team", "arguments", "await_predecessor", "bind", "ceildiv", "common_lanes", "each", "f32",
    "flat", "function", "held_as", "i64", "launch", "load", "raw", "read", "registers", "share", "shared", "storable", "store",
    "store_all", "sync", "when",
]  # fmt: skip

Expr = Any
STORAGE = ("float32", "float16", "bfloat16")
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element."""

_EVERY_LANE = 0xFFFFFFFF


def storable(call: KernelCall, target: Target, *, ints: Sequence[int] = (), pages: int | None = None) -> bool:
    """Whether a GPU target gets a call whose float operands have dtypes that kernels load, and int32 at the positions ``ints``.

    ``pages``: the position of KV pages, which may hold codes.
    """
    if not isinstance(target, GpuTarget) or (pages is not None and stored_as(call, call.args[pages]) is None):
        return False
    floats = [a.dtype for i, a in enumerate(call.args) if i not in ints and i != pages]
    return all(d in STORAGE for d in floats) and all(call.args[i].dtype == "int32" for i in ints)


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


def flat(target: GpuTarget, count: Expr, body: Callable[[Expr], None]) -> None:
    """Run ``body(i)`` (i int64) for i < count, one thread each."""
    threads = min(256, target.max_threads)
    with launch(ceildiv(count, threads), threads) as (thread, block):
        i = bind(block * threads + i64(thread))
        when(i < count, lambda: body(i))


def await_predecessor(target: GpuTarget) -> None:
    """From here on the kernel reads what the ones before it wrote. Without a call of this it waits before anything else.

    See :mod:`llmc.targets.dependent_launch`; every thread has to come by here.
    """
    if dependent_launch.supported(target.mcpu):
        T.evaluate(T.ptx.griddepcontrol.wait())


def common_lanes(target: GpuTarget, dtypes: Sequence[str], *counts: int) -> int:
    """Elements of the widest vector load that suits all ``dtypes`` and divides all of ``counts``: row lengths, offsets."""
    widest = min(target.vector_bits // (8 * WIDTH[d]) for d in dtypes)
    return gcd(1 << (min(widest, target.max_lanes).bit_length() - 1), *counts)


def registers(count: int, dtype: str = "float32", start: float | None = None) -> Expr:
    """A thread's own array. Indexed by constants only (unrolled loops), it lives in registers. ``start``: its first value."""
    held = T.alloc_buffer((count,), dtype, scope="local")
    if start is not None:
        for i in range(count):
            store(held, tirx.const(start, dtype), i)
    return held


def shared(count: int, dtype: str = "float32") -> Expr:
    """An array of the thread block."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def sync() -> None:
    """Wait for every thread of the block; what they stored to shared memory is then seen by all."""
    T.evaluate(T.tvm_storage_sync("shared"))


def held_as(dtype: str) -> str:
    """The dtype in which registers and shared memory hold stored values: bfloat16 as its bits, which every GPU can handle."""
    return "uint16" if dtype == "bfloat16" else dtype


def raw(buffer: Expr, *index: Expr, lanes: int = 1) -> Expr:
    """``lanes`` consecutive elements by one load, in the dtype of :func:`held_as`."""
    value = read(buffer, *index, lanes=lanes)
    return tirx.reinterpret(vector("uint16", lanes), value) if str(buffer.ty.dtype) == "bfloat16" else value


def load(buffer: Expr, *index: Expr, lanes: int = 1) -> list[Expr]:
    """``lanes`` consecutive elements as float32, by one load; the last index is a multiple of ``lanes``.

    Elements of uint16 are the bits of bfloat16.
    """
    if lanes == 1:
        return [bind(_to_float(raw(buffer, *index)))]
    held = registers(lanes, held_as(str(buffer.ty.dtype)))
    store(held, raw(buffer, *index, lanes=lanes), 0, lanes=lanes)
    return [_to_float(held[i]) for i in range(lanes)]


def store_all(buffer: Expr, values: Sequence[Expr], *index: Expr) -> None:
    """Store float32 values to consecutive elements, each rounded once to the buffer's dtype, by one store."""
    dtype, lanes = str(buffer.ty.dtype), len(values)
    if lanes == 1:
        value = narrow(values[0], dtype)
    else:
        held = registers(lanes, held_as(dtype))
        for i, each_value in enumerate(values):
            store(held, narrow(each_value, dtype), i)
        value = read(held, 0, lanes=lanes)
    store(buffer, tirx.reinterpret(vector(dtype, lanes), value) if dtype == "bfloat16" else value, *index, lanes=lanes)


def narrow(value: Expr, dtype: str) -> Expr:
    """A float32 value rounded to nearest even, in the dtype of :func:`held_as`."""
    if dtype == "bfloat16":
        bits = bind(tirx.reinterpret("uint32", value))
        odd = (bits >> tirx.const(16, "uint32")) & tirx.const(1, "uint32")
        rounded = (bits + odd + tirx.const(0x7FFF, "uint32")) >> tirx.const(16, "uint32")
        # Of no number, whose bits may be all ones, the rounding would make a zero.
        number = (bits & tirx.const(0x7FFFFFFF, "uint32")) <= tirx.const(0x7F800000, "uint32")
        return tirx.Cast("uint16", tirx.Select(number, rounded, tirx.const(0x7FC0, "uint32")))
    return value if dtype == "float32" else tirx.Cast(dtype, value)


def each(thread: Expr, threads: int, count: int, body: Callable[[Expr, int], None]) -> None:
    """Share ``count`` items out to ``threads`` threads, unrolled: ``body(item, step)`` for item = step * threads + thread."""
    for step in range(-(-count // threads)):
        item = bind(i64(thread) + step * threads)
        if (step + 1) * threads <= count:
            body(item, step)
        else:
            when(item < count, lambda item=item, step=step: body(item, step))  # type: ignore[misc]


def share(thread: Expr, threads: int, count: int, body: Callable[[Expr], None], at_once: int = 4) -> None:
    """Share ``count`` items out to ``threads`` threads in a loop, ``at_once`` of them unrolled."""
    rounds = count // (threads * at_once)
    if rounds > 1:
        with T.serial(0, rounds) as i:
            for step in range(at_once):
                body(bind((i64(i) * at_once + step) * threads + i64(thread)))
    done = rounds * at_once * threads if rounds > 1 else 0
    each(thread, threads, count - done, lambda item, _: body(bind(item + done)))


class Team:
    """The threads of one block, and what they compute together in groups of neighbours (a power of two of them).

    Every thread of the block must call, in the same order. Groups within a warp exchange registers where the GPU can; all others
    go through shared memory. The order of a group's additions depends on its size alone.
    """

    def __init__(self, target: GpuTarget, thread: Expr, threads: int, largest: int = 0) -> None:
        """``largest``: of the groups that will be asked for; a warp unless named."""
        self.target = target
        self._warp = target.warp_size if target.lane_exchange else 1
        self.thread, self.threads = thread, threads
        self._floats = self._ints = None
        if (largest or target.warp_size) > self._warp:
            self._floats, self._ints = shared(threads), shared(threads, "int32")

    def sum(self, value: Expr, group: int) -> Expr:
        """The sum over the group of each thread, in every thread."""
        return self._reduce(value, group, lambda a, b: a + b)

    def max(self, value: Expr, group: int) -> Expr:
        """The largest value of the group, in every thread."""
        return self._reduce(value, group, tirx.max)

    def _reduce(self, value: Expr, group: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        total = registers(1)
        store(total, value, 0)
        near = min(group, self._warp)
        for distance in _halvings(near):
            store(total, combine(total[0], self._exchange(total[0], distance)), 0)
        if near == group:
            return bind(total[0])
        store(self._floats, total[0], self.thread)
        sync()
        first = bind(self._first(group))
        result = read(self._floats, first)
        for other in range(near, group, near):
            result = combine(result, read(self._floats, first + other))
        result = bind(result)
        sync()  # before anyone stores the next value
        return result

    def best(self, value: Expr, index: Expr, group: int) -> tuple[Expr, Expr]:
        """The largest value of the group and its int32 index, the lowest among equals, in every thread."""
        top, where = registers(1), registers(1, "int32")
        store(top, value, 0)
        store(where, index, 0)

        def consider(other: Expr, other_where: Expr) -> None:
            better = tirx.any(other > top[0], tirx.all(other.equal(top[0]), other_where < where[0]))

            def take() -> None:
                store(top, other, 0)
                store(where, other_where, 0)

            when(better, take)

        near = min(group, self._warp)
        for distance in _halvings(near):
            consider(bind(self._exchange(top[0], distance)), bind(self._exchange(where[0], distance)))
        if near != group:
            store(self._floats, top[0], self.thread)
            store(self._ints, where[0], self.thread)
            sync()
            first = bind(self._first(group))
            for other in range(0, group, near):
                consider(bind(read(self._floats, first + other)), bind(read(self._ints, first + other)))
            sync()
        return bind(top[0]), bind(where[0])

    def _first(self, group: int) -> Expr:
        return self.thread - tirx.floormod(self.thread, group)

    def _exchange(self, value: Expr, distance: int) -> Expr:
        return T.tvm_warp_shuffle_xor(tirx.const(_EVERY_LANE, "uint32"), value, distance, self._warp, self._warp)


def _halvings(count: int) -> list[int]:
    """count/2, count/4, ... 1."""
    return [count >> i for i in range(1, count.bit_length())]


def _to_float(value: Expr) -> Expr:
    dtype = str(value.ty.dtype)
    if dtype == "uint16":
        return tirx.reinterpret("float32", tirx.Cast("uint32", value) << tirx.const(16, "uint32"))
    return value if dtype == "float32" else tirx.Cast("float32", value)
