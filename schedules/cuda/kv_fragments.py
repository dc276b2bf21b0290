"""Keys and values from pages to the 16-bit fragments of ``mma.m16n8k16``, for :mod:`.decode_attention`.

A lane loads 8 consecutive elements of a key's every 32, and of a value's every 64: 16 bytes of a 16-bit type, or 8 of codes. Codes
are widened in registers, exactly, one word of four to two fragments: its even bytes and its odd ones. The queries' elements change
places alike; for values, whose words hold two positions by then, those are the two rows that a fragment needs anyway.

- int8: 128 + (c mod 128) and 128 + (128 if c < 0) are bfloat16 numbers of which the code's bits are the last ones; the difference
  is c. (Numbers in the mantissa of a power of two: Kim et al., 2022, "Who Says Elephants Can't Run", 3.2.)
- e4m3: exponent and mantissa move to their places; a product by 2^120 corrects the exponent's bias, of subnormal numbers too.

A code's scale is that of its slot: scores and weights are multiplied by it, not elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from llmc.kv_layout import PageLayout
from llmc.schedules.cuda.quantized_codes import MULTIPLY_ADD, NEGATIVE, SELECT, both
from llmc.schedules.kv_pages import page_layout_of
from llmc.schedules.protocol import KernelCall

Expr = Any
LOAD = "ld.global.L1::no_allocate.L2::256B"
"""Not ``.nc``: the newest positions are written by a kernel that may still run when this one starts."""

SCHEMES = ("int8", "fp8_e4m3")
"""Of codes in bytes with one scale a slot, which are widened to bfloat16."""

_MINUS_ONE = 0xBF80BF80
_TWO_TO_120 = 0x7B807B80


@dataclass(frozen=True)
class Fragments:
    """How one call's pages are read. ``key_words``, ``value_words``: registers of a lane for a key, or a value.

    ``load_key(words, base, pages, page, head, start, member)`` and ``load_value(..., row)`` fill registers from ``base`` on with a
    lane's elements of the vector that starts at ``start``; ``load_query`` is ``load_key`` for queries.
    ``key(fragment, words, base, s)``: the B fragment of elements 16 s ...;
    ``value(fragment, at, words, one, two, m)``: registers ``at``, ``at + 1`` of the A fragment of result tile m, from the words of
    two positions. ``permute(queries, count)``: queries, loaded as they are stored, in the order of keys.
    """

    layout: PageLayout
    key_words: int
    value_words: int
    load_key: Any
    load_value: Any
    load_query: Any
    key: Any
    value: Any
    permute: Any

    @property
    def codes(self) -> bool:
        return self.layout.scheme is not None


def fragments(call: KernelCall) -> Fragments:
    """For a call that :mod:`.decode_attention` takes."""
    d, dv = int(call.args[0].shape[2]), int(call.attr("v_dim"))
    layout = page_layout_of(call, call.args[1], d, dv)
    load_query, _ = loaders(d, dv, "ld.global")
    if layout.scheme is None:
        load_key, load_value = loaders(d, dv)
        return Fragments(layout, d // 8, dv // 16, load_key, load_value, load_query, _key, _value, _as_stored)
    load_key, load_value = loaders(d, dv, load=_CODES)
    widen = _widen_int8 if layout.scheme.kind == "int" else _widen_e4m3
    key, value = _code_readers(widen)
    return Fragments(layout, d // 16, -(-dv // 32), load_key, load_value, load_query, key, value, _even_and_odd)


_NUMBERS = {8: ".v4.b32", 4: ".v2.b32", 2: ".b32"}
_CODES = {8: ".v2.b32", 4: ".b32", 2: ".b16"}
"""The suffix of the instruction for 8, 4 and 2 elements."""


def loaders(d: int, dv: int, instruction: str = LOAD, load: dict[int, str] = _NUMBERS) -> tuple[Any, Any]:
    """``load_key`` and ``load_value`` of :class:`Fragments` for tensors [pages, heads, elements] that ``instruction`` reads."""
    each = {8: 4, 4: 2, 2: 1} if load[8] == ".v4.b32" else {8: 2, 4: 1, 2: 1}
    wide_k, wide_v = d // 32, dv // 64
    has_tail, has_middle, has_narrow = d % 32 > 0, dv % 64 >= 32, dv % 32 > 0
    last = wide_v * each[8] + has_middle * each[4]

    @T.inline
    def fetch(words: Expr, base: Expr, address: Expr, count: Expr) -> None:
        if load[count] == ".v4.b32":
            T.ptx[instruction + ".v4.b32"](words[base], words[base + 1], words[base + 2], words[base + 3], address)
        elif load[count] == ".v2.b32":
            T.ptx[instruction + ".v2.b32"](words[base], words[base + 1], address)
        elif load[count] == ".b32":
            T.ptx[instruction + ".b32"](words[base], address)
        else:
            half = T.alloc_local((1,), "uint16")
            T.ptx[instruction + ".b16"](half[0], address)
            words[base] = T.cast(half[0], "uint32")

    @T.inline
    def load_key(words: Expr, base: Expr, pages: Expr, page: Expr, head: Expr, start: Expr, member: Expr) -> None:
        for s in T.unroll(wide_k):
            fetch(words, base + s * each[8], pages.ptr_to([T.cast(page, "int64"), head, start + s * 32 + member * 8]), 8)
        if has_tail:
            fetch(words, base + wide_k * each[8], pages.ptr_to([T.cast(page, "int64"), head, start + wide_k * 32 + member * 4]), 4)

    @T.inline
    def load_value(words: Expr, base: Expr, pages: Expr, page: Expr, head: Expr, start: Expr, row: Expr) -> None:
        for w in T.unroll(wide_v):
            fetch(words, base + w * each[8], pages.ptr_to([T.cast(page, "int64"), head, start + w * 64 + row * 8]), 8)
        if has_middle:
            fetch(words, base + wide_v * each[8], pages.ptr_to([T.cast(page, "int64"), head, start + wide_v * 64 + row * 4]), 4)
        if has_narrow:
            fetch(words, base + last, pages.ptr_to([T.cast(page, "int64"), head, start + dv - 16 + row * 2]), 2)

    return load_key, load_value


@T.inline
def _key(fragment: Expr, words: Expr, base: Expr, s: Expr) -> None:
    fragment[0] = words[base + s * 2]
    fragment[1] = words[base + s * 2 + 1]


@T.inline
def _value(fragment: Expr, at: Expr, words: Expr, one: Expr, two: Expr, m: Expr) -> None:
    T.ptx["prmt.b32"](fragment[at], words[one + m], words[two + m], T.uint32(0x5410))
    T.ptx["prmt.b32"](fragment[at + 1], words[one + m], words[two + m], T.uint32(0x7632))


@T.inline
def _as_stored(queries: Expr, count: Expr) -> None:
    pass


@T.inline
def _even_and_odd(queries: Expr, count: Expr) -> None:
    even = T.alloc_local((1,), "uint32")
    for i in T.unroll(count // 2):
        T.ptx["prmt.b32"](even[0], queries[2 * i], queries[2 * i + 1], T.uint32(0x5410))
        T.ptx["prmt.b32"](queries[2 * i + 1], queries[2 * i], queries[2 * i + 1], T.uint32(0x7632))
        queries[2 * i] = even[0]


def _code_readers(widen: Any) -> tuple[Any, Any]:
    @T.inline
    def key(fragment: Expr, words: Expr, base: Expr, s: Expr) -> None:
        widen(fragment, 0, words[base + s])

    @T.inline
    def value(fragment: Expr, at: Expr, words: Expr, one: Expr, two: Expr, m: Expr) -> None:
        pairs = T.alloc_local((1,), "uint32")
        rows = T.meta_var(T.Select(m % 2 == 1, T.uint32(0x7632), T.uint32(0x5410)))
        T.ptx["prmt.b32"](pairs[0], words[one + m // 2], words[two + m // 2], rows)
        widen(fragment, at, pairs[0])

    return key, value


@T.inline
def _widen_int8(fragment: Expr, at: Expr, word: Expr) -> None:
    minus = T.alloc_local((1,), "uint32")
    for odd in T.unroll(2):
        code = T.meta_var(T.Select(odd == 1, word >> T.uint32(8), word))
        T.ptx["lop3.b32"](fragment[at + odd], code, T.uint32(both(0x007F)), T.uint32(both(0x4300)), SELECT)
        T.ptx["lop3.b32"](minus[0], code, T.uint32(both(0x0080)), T.uint32(both(0x4300)), SELECT)
        T.ptx[MULTIPLY_ADD["bfloat16"]](fragment[at + odd], minus[0], T.uint32(_MINUS_ONE), fragment[at + odd])


@T.inline
def _widen_e4m3(fragment: Expr, at: Expr, word: Expr) -> None:
    for odd in T.unroll(2):
        code = T.meta_var(T.Select(odd == 1, word, word << T.uint32(8)))
        T.ptx["lop3.b32"](fragment[at + odd], code >> T.uint32(4), T.uint32(both(0x07F0)), code & T.uint32(both(0x8000)), SELECT)
        T.ptx[MULTIPLY_ADD["bfloat16"]](fragment[at + odd], fragment[at + odd], T.uint32(_TWO_TO_120), T.uint32(NEGATIVE))
