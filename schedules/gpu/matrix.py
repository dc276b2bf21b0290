"""Tiles of a product by a target's matrix instruction: fragments from shared memory, products, and the sums back to shared memory.

One class for each form of :class:`~llmc.targets.base.MatrixInstruction`, with one interface, :class:`Fragments`. A warp computes
``down`` x ``across`` results of the instruction. Operand tiles lie in shared memory as lines of k elements, ``pitch`` apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from tvm import tirx
from tvm.backend.metal import op as metal
from tvm.tirx.script import builder as T

from llmc.schedules.gpu.emit import bind, f32, read, registers, store
from llmc.targets.base import GpuTarget, MatrixInstruction

Expr = Any


class Fragments(ABC):
    """What the forms share. Offsets into shared memory are in elements of its arrays."""

    def __init__(self, how: MatrixInstruction, dtype: str, warp: int, lane: Expr, down: int, across: int) -> None:
        self.how, self.name, self.lane, self.down, self.across = how, how.name(dtype), lane, down, across
        self.m, self.n, self.k = how.shape
        self.sums = self.m * self.n // warp
        """A lane's share of a result."""

    @abstractmethod
    def multiply(self, x: Expr, x_at: Expr, w: Expr, w_at: Expr, pitch: int) -> None:
        """Add the products of the warp's lines of two tiles, k columns of them, from ``x_at`` and ``w_at`` on."""

    @abstractmethod
    def spill(self, i: int, j: int, out: Expr, at: Expr, pitch: int) -> None:
        """The sums of result (i, j) to the float32 array ``out``, m lines of n."""


class LaneFragments(Fragments):
    """The instruction is a function of vectors of words, which the target's code generator knows by its name."""

    def __init__(self, how: MatrixInstruction, dtype: str, warp: int, lane: Expr, down: int, across: int) -> None:
        super().__init__(how, dtype, warp, lane, down, across)
        self.words = how.width // 2
        self.acc = registers(down * across * self.sums, start=0.0)
        self.a, self.b = registers(down * self.words, "int32"), registers(across * self.words, "int32")

    def multiply(self, x: Expr, x_at: Expr, w: Expr, w_at: Expr, pitch: int) -> None:
        for held, count, lines, tile, at in ((self.a, self.down, self.m, x, x_at), (self.b, self.across, self.n, w, w_at)):
            line = tirx.floormod(self.lane, lines)
            begin = tirx.floormod(tirx.floordiv(self.lane, lines) * self.words, self.k // 2)
            place, step = bind(at + line * pitch + begin), min(self.words, 4)
            for i in range(count):
                for word in range(0, self.words, step):
                    store(held, read(tile, place + (i * lines * pitch + word), lanes=step), i * self.words + word, lanes=step)
        for i in range(self.down):
            for j in range(self.across):
                at = (i * self.across + j) * self.sums
                operands = [read(self.a, i * self.words, lanes=self.words), read(self.b, j * self.words, lanes=self.words)]
                result = tirx.call_pure_extern(f"float32x{self.sums}", self.name, *operands, read(self.acc, at, lanes=self.sums))
                store(self.acc, result, at, lanes=self.sums)

    def spill(self, i: int, j: int, out: Expr, at: Expr, pitch: int) -> None:
        by_lane, by_element = self.how.strides
        place = bind(at + tirx.floordiv(self.lane, self.n) * (by_lane * pitch) + tirx.floormod(self.lane, self.n))
        for e in range(self.sums):
            store(out, self.acc[(i * self.across + j) * self.sums + e], place + e * by_element * pitch)


class PtxFragments(Fragments):
    """mma.m16n8k16 and ldmatrix: lane 4 g + t has columns 2 t and 2 t + 1 of rows g and g + 8 of a result."""

    LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"

    def __init__(self, how: MatrixInstruction, dtype: str, warp: int, lane: Expr, down: int, across: int) -> None:
        super().__init__(how, dtype, warp, lane, down, across)
        self.acc = registers(down * across * self.sums, start=0.0)
        self.a, self.b = registers(4 * down, "uint32"), registers(4 * -(-across // 2), "uint32")

    def multiply(self, x: Expr, x_at: Expr, w: Expr, w_at: Expr, pitch: int) -> None:
        a_at = bind(x_at + tirx.floormod(self.lane, 16) * pitch + tirx.floordiv(self.lane, 16) * 4)
        b_line = tirx.floormod(self.lane, 8) + tirx.floordiv(self.lane, 16) * 8
        b_at = bind(w_at + b_line * pitch + tirx.floormod(tirx.floordiv(self.lane, 8), 2) * 4)
        for held, count, tile, at in ((self.a, self.down, x, a_at), (self.b, -(-self.across // 2), w, b_at)):
            for i in range(count):
                into = [held[4 * i + e] for e in range(4)]
                T.evaluate(T.ptx[self.LOAD](*into, tirx.address_of(tile[at + i * 16 * pitch])))
        for i in range(self.down):
            for j in range(self.across):
                d = [self.acc[(i * self.across + j) * 4 + e] for e in range(4)]
                a, b = [self.a[4 * i + e] for e in range(4)], [self.b[2 * j + e] for e in range(2)]
                T.evaluate(T.ptx[self.name](*d, *a, *b, *d))

    def spill(self, i: int, j: int, out: Expr, at: Expr, pitch: int) -> None:
        place = bind(at + tirx.floordiv(self.lane, 4) * pitch + tirx.floormod(self.lane, 4) * 2)
        for half in range(2):
            held = read(self.acc, (i * self.across + j) * 4 + 2 * half, lanes=2)
            store(out, held, place + half * 8 * pitch, lanes=2)


class SimdgroupFragments(Fragments):
    """Metal's simdgroup matrices: a fragment is a variable of the whole warp."""

    def __init__(self, how: MatrixInstruction, dtype: str, warp: int, lane: Expr, down: int, across: int) -> None:
        super().__init__(how, dtype, warp, lane, down, across)
        size, held = self.m * self.n, how.held_as(dtype)
        self.acc = T.alloc_buffer((down * across * size,), "float32", scope="metal.simdgroup")
        self.a = T.alloc_buffer((down * size,), held, scope="metal.simdgroup")
        self.b = T.alloc_buffer((across * size,), held, scope="metal.simdgroup")
        for i in range(down * across):
            T.evaluate(metal.make_filled_simdgroup_matrix(self.acc.data, i, f32(0.0)))

    def multiply(self, x: Expr, x_at: Expr, w: Expr, w_at: Expr, pitch: int) -> None:
        for held, count, tile, at, turned in ((self.a, self.down, x, x_at, False), (self.b, self.across, w, w_at, True)):
            for i in range(count):
                place = tirx.address_of(tile[at + i * self.m * pitch])
                T.evaluate(metal.simdgroup_load(held.data, i, place, pitch, transpose_matrix=turned))
        for i in range(self.down):
            for j in range(self.across):
                d = (self.acc.data, i * self.across + j)
                T.evaluate(metal.simdgroup_multiply_accumulate(*d, self.a.data, i, self.b.data, j, *d))

    def spill(self, i: int, j: int, out: Expr, at: Expr, pitch: int) -> None:
        T.evaluate(metal.simdgroup_store(self.acc.data, i * self.across + j, tirx.address_of(out[at]), pitch))


_FORMS: dict[str, type[LaneFragments | PtxFragments | SimdgroupFragments]] = {
    "lanes": LaneFragments,
    "ptx": PtxFragments,
    "simdgroup": SimdgroupFragments,
}


def fragments(target: GpuTarget, dtype: str, lane: Expr, down: int, across: int) -> Fragments:
    """The fragments of a warp's tile of ``down`` x ``across`` results, its sums zero."""
    assert target.matrix is not None
    return _FORMS[target.matrix.form](target.matrix, dtype, target.warp_size, lane, down, across)
