"""Keys and values on their way to and from the pages: floats, or the codes of :mod:`llmc.dialect.kv_codes`, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from llmc.kv_layout import KvScheme, PageLayout
from llmc.schedules.cpu.emit import Simd, bind, each_vector, f32, local, prefetch, read, shuffle, store, vector, words
from llmc.schedules.cpu.quantized_rows import rounded
from llmc.schedules.kv_codes import decode, down, encode_e4m3, parameter, scale_of, upper_half

Expr = Any
Load = Callable[[Expr, int], Expr]
"""``load(start, lanes)``: consecutive float32 elements of a key or value."""


class Side:
    """The keys of the pages, or their values: ``dim`` elements a slot, codes from ``start`` on, parameters from ``parameters``."""

    def __init__(self, simd: Simd, pages: Expr, layout: PageLayout, keys: bool) -> None:
        self.simd, self.pages, self.layout, self.scheme = simd, pages, layout, layout.scheme
        self.dim = layout.k_dim if keys else layout.v_dim
        self.width = layout.key_width if keys else layout.value_width
        self.start = 0 if keys else layout.values
        self.parameters = 0
        if layout.scheme is not None:
            self.parameters = layout.key_parameters if keys else layout.value_parameters

    def load(self, page: Expr, head: Expr, slot: Expr, at: Expr, lanes: int) -> Expr:
        """``lanes`` elements from ``at`` on as float32, codes of a scheme unscaled; several of 4 bits start at an even one."""
        base = self.start + slot * self.width
        if self.scheme is None:
            return self.simd.load(self.pages, page, head, base + at, lanes=lanes)
        if self.scheme.bits == 8:
            return decode(read(self.pages, page, head, base + at, lanes=lanes), self.scheme, lanes)
        if lanes == 1:
            byte = tirx.Cast("uint32", read(self.pages, page, head, base + tirx.floordiv(at, 2)))
            return tirx.Cast("float32", (byte >> tirx.Cast("uint32", tirx.floormod(at, 2) * 4)) & words(15, 1))
        half = lanes // 2
        pair = bind(tirx.Cast(vector("int32", half), read(self.pages, page, head, base + tirx.floordiv(at, 2), lanes=half)))
        low, high = bind(pair & _ints(15, half)), bind(pair >> _ints(4, half))
        both = shuffle([low, high], [i // 2 + half * (i % 2) for i in range(lanes)])
        return tirx.Cast(vector("float32", lanes), both)

    def ask(self, page: Expr, head: Expr, slot: Expr) -> None:
        """Have the codes of a slot fetched: slots of one page lie together, pages anywhere."""
        prefetch(self.pages, page, head, self.start + slot * self.width, self.width)

    def parameter(self, page: Expr, head: Expr, slot: Expr, index: int) -> Expr:
        """A parameter of a slot as float32: the scale of each group, then each minimum."""
        assert self.scheme is not None
        at = self.parameters + 2 * (slot * self.scheme.parameters(self.dim) + index)
        return parameter(read(self.pages, page, head, at, lanes=2))

    def write(self, page: Expr, head: Expr, slot: Expr, load: Load) -> None:
        """Store a whole key or value, whose elements ``load`` gives (more than once)."""
        if self.scheme is not None:
            self._quantize(self.scheme, page, head, slot, load)
            return
        write = self.writer(page, head, slot)
        each_vector(self.dim, self.simd.lanes, lambda start, lanes: write(start, load(start, lanes), lanes))

    def writer(self, page: Expr, head: Expr, slot: Expr) -> Callable[[Expr, Expr, int], None]:
        """``write(start, value, lanes)`` that stores elements of a slot as floats, in any order."""
        base = self.start + slot * self.width

        def write(start: Expr, value: Expr, lanes: int) -> None:
            store(self.pages, self.simd.narrow(value, self.layout.dtype, lanes), page, head, base + start, lanes=lanes)

        return write

    def _quantize(self, scheme: KvScheme, page: Expr, head: Expr, slot: Expr, load: Load) -> None:
        for group in range(scheme.groups(self.dim)):
            self._quantize_group(scheme, page, head, slot, group, load)

    def _quantize_group(self, scheme: KvScheme, page: Expr, head: Expr, slot: Expr, group: int, load: Load) -> None:
        groups, first = scheme.groups(self.dim), group * scheme.span(self.dim)
        count = min(scheme.span(self.dim), self.dim - first)

        def part(start: Expr, lanes: int) -> Expr:
            return load(first + start, lanes)

        low = None
        if scheme.minimum:
            low = bind(down(f32(0.0) - self._largest(count, part, lambda x, lanes: self.simd.splat(0.0, lanes) - x)))
            self._store_parameter(page, head, slot, scheme, groups + group, low)
            reach = bind(self._largest(count, part, lambda x, _: x) - low)
        else:
            reach = self._largest(count, part, _absolute)
        scale, inverse = scale_of(reach, scheme)
        self._store_parameter(page, head, slot, scheme, group, scale)

        def codes(start: Expr, lanes: int) -> None:
            value = part(start, lanes)
            value = bind(value if low is None else value - self.simd.splat(low, lanes))
            self._store_codes(scheme, page, head, slot, first + start, value, inverse, lanes)

        each_vector(count, max(self.simd.lanes, 8 // scheme.bits), codes)

    def _largest(self, count: int, load: Load, of: Callable[[Expr, int], Expr]) -> Expr:
        """The largest ``of(element)`` of ``count``."""
        lanes = self.simd.widest(count)
        acc, tail = local(lanes), local(1)
        zero = tirx.const(0, "int64")
        store(acc, of(load(zero, lanes), lanes), 0, lanes=lanes)
        store(tail, of(load(zero, 1), 1), 0)

        def add(start: Expr, width: int) -> None:
            value = bind(of(load(start, width), width))
            if width == lanes:
                store(acc, tirx.max(read(acc, 0, lanes=lanes), value), 0, lanes=lanes)
            else:
                store(tail, tirx.max(read(tail, 0), self.simd.largest(value)), 0)

        each_vector(count, lanes, add)
        return bind(tirx.max(self.simd.largest(read(acc, 0, lanes=lanes)), read(tail, 0)))

    def _store_parameter(self, page: Expr, head: Expr, slot: Expr, scheme: KvScheme, index: int, value: Expr) -> None:
        at = self.parameters + 2 * (slot * scheme.parameters(self.dim) + index)
        store(self.pages, upper_half(value), page, head, at, lanes=2)

    def _store_codes(
        self, scheme: KvScheme, page: Expr, head: Expr, slot: Expr, at: Expr, value: Expr, inverse: Expr, lanes: int
    ) -> None:
        base = self.start + slot * self.width
        if scheme.kind == "fp8_e4m3":
            codes = encode_e4m3(bind(value * self.simd.splat(inverse, lanes)), lanes)
            store(self.pages, tirx.Cast(vector("uint8", lanes), codes), page, head, base + at, lanes=lanes)
            return
        codes = rounded(self.simd, value, inverse, lanes)
        if scheme.bits == 8:
            store(self.pages, tirx.Cast(vector("uint8", lanes), codes & _ints(255, lanes)), page, head, base + at, lanes=lanes)
            return
        pairs = max(1, lanes // 2)  # one lane: the last of an odd number
        if lanes > 1:
            even, odd = (bind(shuffle([codes], range(first, lanes, 2))) for first in (0, 1))
            codes = even | (odd << _ints(4, pairs))
        store(self.pages, tirx.Cast(vector("uint8", pairs), codes), page, head, base + tirx.floordiv(at, 2), lanes=pairs)


def _absolute(value: Expr, lanes: int) -> Expr:
    return tirx.call_llvm_pure_intrin(vector("float32", lanes), "llvm.fabs", value)


def _ints(value: int, lanes: int) -> Expr:
    constant = tirx.const(value, "int32")
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)
