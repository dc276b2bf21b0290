"""Keys and values on their way to and from pages of codes (:mod:`llmc.dialect.kv_codes`), on any GPU.

Writing, a group of elements that share parameters is held in the registers of a few neighbouring threads, who find its largest
element together. Reading, a thread decodes a few neighbouring elements of one slot.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from tvm import tirx

from llmc.kv_layout import PageLayout
from llmc.schedules.cpu.emit import words
from llmc.schedules.gpu.emit import Team, bind, f32, i64, read, registers, store, when
from llmc.schedules.kv_codes import decode, down, encode_e4m3, scale_of
from llmc.targets.base import GpuTarget

Expr = Any
Load = Callable[[Expr], Expr]
"""``load(at)``: one float32 element of a key or value."""

MOST_HELD = 8
"""Elements of a group that a thread holds if there are threads enough."""

ROUND = 12582912.0
"""1.5 · 2^23: a float below 2^22 plus this has its nearest integer in the low bits."""


def team_size(target: GpuTarget, dim: int) -> int:
    """Threads, a power of two within a warp, that take a vector of ``dim`` elements."""
    return 1 << (min(target.warp_size, -(-dim // MOST_HELD)).bit_length() - 1)


class Side:
    """The keys of pages of codes, or their values: ``dim`` elements a slot."""

    def __init__(self, target: GpuTarget, pages: Expr, layout: PageLayout, keys: bool) -> None:
        assert layout.scheme is not None
        self.target, self.pages, self.scheme = target, pages, layout.scheme
        self.dim = layout.k_dim if keys else layout.v_dim
        self.width = layout.key_width if keys else layout.value_width
        self.start = 0 if keys else layout.values
        self.parameters = layout.key_parameters if keys else layout.value_parameters

    def lanes(self, *counts: int) -> int:
        """Elements, at most four, that are read at once: they divide ``counts``, and are in one group."""
        per_byte = 8 // self.scheme.bits
        lanes = gcd(4, self.scheme.span(self.dim), self.dim, *counts)
        code_bytes = gcd(lanes // per_byte or 1, self.start, self.width)
        return code_bytes * per_byte if lanes % per_byte == 0 else 1

    def load(self, page: Expr, head: Expr, slot: Expr, at: Expr, lanes: int) -> list[Expr]:
        """``lanes`` (:meth:`lanes`) elements from ``at`` on as float32."""
        scheme = self.scheme
        group = bind(tirx.floordiv(at, scheme.span(self.dim)))
        scale = self._parameter(page, head, slot, group)
        low = self._parameter(page, head, slot, group + scheme.groups(self.dim)) if scheme.minimum else None
        return [code * scale if low is None else code * scale + low for code in self._codes(page, head, slot, at, lanes)]

    def _codes(self, page: Expr, head: Expr, slot: Expr, at: Expr, lanes: int) -> list[Expr]:
        base = bind(self.start + slot * self.width)
        if self.scheme.bits == 8:
            held = registers(lanes, "uint8")
            store(held, read(self.pages, page, head, base + at, lanes=lanes), 0, lanes=lanes)
            return [decode(held[i], self.scheme, 1) for i in range(lanes)]
        if lanes == 1:
            byte = tirx.Cast("int32", read(self.pages, page, head, base + tirx.floordiv(at, 2)))
            return [tirx.Cast("float32", (byte >> tirx.Cast("int32", tirx.floormod(at, 2) * 4)) & 15)]
        pairs = registers(lanes // 2, "uint8")
        store(pairs, read(self.pages, page, head, base + tirx.floordiv(at, 2), lanes=lanes // 2), 0, lanes=lanes // 2)
        return [tirx.Cast("float32", (tirx.Cast("int32", pairs[i // 2]) >> (4 * (i % 2))) & 15) for i in range(lanes)]

    def _parameter(self, page: Expr, head: Expr, slot: Expr, index: Expr) -> Expr:
        at = bind(self.parameters + 2 * (slot * self.scheme.parameters(self.dim) + index))
        # Byte by byte: TVM takes a buffer whose every access is a vector for one of vectors, whatever their widths.
        low, high = (tirx.Cast("uint32", read(self.pages, page, head, at + i)) for i in range(2))
        return bind(tirx.reinterpret("float32", (low << words(16, 1)) | (high << words(24, 1))))

    def write(self, team: Team, threads: int, active: Expr, page: Expr, head: Expr, slot: Expr, load: Load) -> None:
        """Store a whole key or value if ``active``: one for each ``threads`` neighbours of the block, who all take part."""
        scheme, span, groups = self.scheme, self.scheme.span(self.dim), self.scheme.groups(self.dim)
        each = min(threads, team_size(self.target, span))
        count = -(-span // each)
        count += count % (8 // scheme.bits)  # codes of a byte are in one thread
        at_once = threads // each
        member = tirx.floormod(team.thread, threads)
        mine = bind(i64(tirx.floormod(member, each)) * count)
        for step in range(-(-groups // at_once)):
            group = bind(step * at_once + i64(tirx.floordiv(member, each)))
            first = bind(group * span + mine)
            end = bind(tirx.min((group + 1) * span, i64(self.dim)))
            # Elements that do not exist repeat the last one of the vector.
            held = registers(count)
            for i in range(count):
                store(held, load(tirx.min(first + i, tirx.max(end, 1) - 1)), i)
            low, scale, inverse = self._parameters(team, each, [held[i] for i in range(count)])

            def put(group: Expr = group, first: Expr = first, end: Expr = end, held: Expr = held, low: Any = low,
                    scale: Expr = scale, inverse: Expr = inverse) -> None:  # fmt: skip
                self._store_codes(page, head, slot, first, end, [held[i] for i in range(count)], low, inverse)

                def parameters() -> None:
                    self._store_parameter(page, head, slot, group, scale)
                    if low is not None:
                        self._store_parameter(page, head, slot, group + groups, low)

                when(mine.equal(0), parameters)

            when(tirx.all(active, group < groups), put)

    def _parameters(self, team: Team, each: int, held: list[Expr]) -> tuple[Expr | None, Expr, Expr]:
        """Minimum (or None), scale and its inverse of the group whose elements ``each`` threads hold."""

        def largest(of: Callable[[Expr], Expr]) -> Expr:
            high = of(held[0])
            for value in held[1:]:
                high = tirx.max(high, of(value))
            return team.max(high, each)

        if not self.scheme.minimum:
            return None, *scale_of(largest(lambda x: tirx.max(x, f32(0.0) - x)), self.scheme)
        low = bind(down(f32(0.0) - largest(lambda x: f32(0.0) - x)))
        return low, *scale_of(bind(largest(lambda x: x) - low), self.scheme)

    def _store_parameter(self, page: Expr, head: Expr, slot: Expr, index: Expr, value: Expr) -> None:
        at = bind(self.parameters + 2 * (slot * self.scheme.parameters(self.dim) + index))
        bits = bind(tirx.reinterpret("uint32", value))
        for i in range(2):
            byte = (bits >> words(16 + 8 * i, 1)) & words(0xFF, 1)
            store(self.pages, tirx.Cast("uint8", byte), page, head, at + i)

    def _store_codes(
        self, page: Expr, head: Expr, slot: Expr, first: Expr, end: Expr, held: list[Expr], low: Expr | None, inverse: Expr
    ) -> None:
        """The codes of ``held``, those before ``end``: four bytes at a time where all exist and places allow."""
        per_byte = 8 // self.scheme.bits
        codes = [self._code(value if low is None else value - low, inverse) for value in held]
        if per_byte == 2:
            if self.dim % 2:  # the last byte has one
                zero = tirx.const(0, "uint32")
                codes = [tirx.Select(first + i < end, code, zero) if i % 2 else code for i, code in enumerate(codes)]
            codes = [codes[i] | (codes[i + 1] << tirx.const(4, "uint32")) for i in range(0, len(codes), 2)]
        whole = self.dim % (len(held)) == 0 and self.scheme.span(self.dim) % len(held) == 0
        lanes = gcd(4, len(codes), self.width, self.start) if whole else 1
        base = bind(self.start + slot * self.width + tirx.floordiv(first, per_byte))
        for i in range(0, len(codes), lanes):
            value = registers(lanes, "uint8")
            for j in range(lanes):
                store(value, tirx.Cast("uint8", codes[i + j]), j)

            def put(i: int = i, value: Expr = value) -> None:
                store(self.pages, read(value, 0, lanes=lanes), page, head, base + i, lanes=lanes)

            when(first + i * per_byte < end, put)

    def _code(self, value: Expr, inverse: Expr) -> Expr:
        """The code of one value in the low bits of uint32, other bits zero."""
        product = bind(value * inverse)
        if self.scheme.kind == "fp8_e4m3":
            return bind(encode_e4m3(product, 1))
        bits = tirx.reinterpret("uint32", product + f32(ROUND))
        return bind(bits & tirx.const((1 << self.scheme.bits) - 1, "uint32"))
