"""Codes of the layout ``gpu.mma`` into the 16-bit values that tensor cores multiply, in registers and without rounding.

Integers: a code is put into the low bits of a power of two's significand, which a subtraction takes off again: exact, since
integers of 8 bits with a sign fit the significands of both 16-bit types. A value is code - 2^(bits - 1) whatever the offset of
the scheme. fp8 e4m3: sign, exponent and significand move to their places in the wider type, and a multiplication by a power
of two corrects the exponent's bias, subnormal numbers included. (Kim et al., 2022, "Who Says Elephants Can't Run", 3.2.) Tensor
cores multiply subnormal numbers exactly (Fasi et al., 2021, "Numerical behavior of NVIDIA tensor cores"): x and the sums can be
corrected instead (:func:`lifted`).
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.passes.quantize.scheme import Scheme
from llmc.schedules.cuda import hopper

Expr = Any
SELECT = 0xEA
"""lop3: (a & b) | c."""

SELECT_INVERTED = 0xAE
"""lop3: (~a & b) | c."""

CHOOSE = 0xCA
"""lop3: (a & b) | (~a & c)."""

ONES = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}
"""A pair of ones."""


NEGATIVE = 0x80008000
"""The sign bits of a pair; a pair of negative zeros, which a product keeps its sign by."""

MULTIPLY_ADD = {"bfloat16": "fma.rn.bf16x2", "float16": "fma.rn.f16x2"}
"""Sums and products are spelled as a fused multiply-add, which bfloat16 has from sm_80 on; a plain one only from sm_90 on."""


def both(bits: int) -> int:
    """A register with ``bits`` in each half."""
    return bits << 16 | bits


def middle(how: Scheme) -> int:
    """What :func:`decoder` takes off an integer code."""
    return 1 << (how.bits - 1)


LIFT = 60
"""Half of what e4m3's exponent in bfloat16 is too low by, as a power of two."""


def lifted(how: Scheme, dtype: str) -> bool:
    """Whether x and the sums can stand in for the multiplication that corrects e4m3's exponent: 2^60 times each. In bfloat16, whose
    exponents go as far as float32's: |x| must stay below 2^67."""
    return how.kind == "fp8_e4m3" and dtype == "bfloat16"


@T.inline
def lift(registers: Expr, count: Expr) -> None:
    """Pairs of bfloat16 times 2^60, exactly."""
    for i in T.unroll(count):
        T.ptx[MULTIPLY_ADD["bfloat16"]](registers[i], registers[i], T.uint32(both(127 + LIFT << 7)), T.uint32(NEGATIVE))


def decoder(how: Scheme, dtype: str, low: bool = False) -> Any:
    """``decode(fragment, words, base, s, p)``: the A fragment of one m16n8k16 from a lane's four words of a chunk.

    The multiplication covers columns 4 p .. 4 p + 3 of each lane's 8 in block ``s`` of 32 (8 bits: s = 0). ``words[base + i]`` is
    word i; ``fragment`` has four uint32. ``s`` and ``p`` are constants. ``low``: values are 2^-120 times what they are, where
    :func:`lifted` says that they may be.
    """
    if how.kind == "fp8_e4m3":
        return _decode_e4m3(dtype, low)
    if how.bits <= 4:
        return _decode_nibbles(how, dtype)
    return _decode_bytes_f16(how) if dtype == "float16" else _decode_bytes_bf16(how)


def _decode_nibbles(how: Scheme, dtype: str) -> Any:
    # 128 + c in bfloat16, 1024 + c in float16: c in the last bits.
    base = {"bfloat16": 0x4300, "float16": 0x6400}[dtype]
    magic, taken_off, one = T.uint32(both(base)), T.uint32(both(base + middle(how)) | NEGATIVE), T.uint32(ONES[dtype])
    multiply_add = MULTIPLY_ADD[dtype]

    @T.inline
    def decode(fragment: Expr, words: Expr, base: Expr, s: Expr, p: Expr) -> None:
        for j in T.unroll(4):
            T.ptx["lop3.b32"](
                fragment[j], words[base + s * 2 + j % 2] >> T.uint32(4 * (2 * p + j // 2)), T.uint32(0x000F000F), magic, SELECT
            )
            T.ptx[multiply_add](fragment[j], fragment[j], one, taken_off)

    return decode


def _decode_bytes_f16(how: Scheme) -> Any:
    taken_off, one = T.uint32(both(0x6400 + middle(how)) | NEGATIVE), T.uint32(ONES["float16"])

    @T.inline
    def decode(fragment: Expr, words: Expr, base: Expr, s: Expr, p: Expr) -> None:
        for j in T.unroll(4):
            T.ptx["prmt.b32"](fragment[j], words[base + j % 2 * 2 + p], T.uint32(0x64646464), T.uint32(0x4240 + 0x0101 * (j // 2)))
            T.ptx[MULTIPLY_ADD["float16"]](fragment[j], fragment[j], one, taken_off)

    return decode


def _decode_bytes_bf16(how: Scheme) -> Any:
    # 128 + c in bfloat16: there is room for seven bits of c. An eighth decides what is taken off, -128 (0xC300) if it is set, else
    # -256 (0xC380), which differ in that very bit.
    has_eighth, one = how.bits == 8, T.uint32(ONES["bfloat16"])
    taken_off = T.uint32(both(0x4300 + middle(how) % 128) | NEGATIVE)

    @T.inline
    def decode(fragment: Expr, words: Expr, base: Expr, s: Expr, p: Expr) -> None:
        off = T.alloc_local((1,), "uint32")
        for j in T.unroll(4):
            word = T.meta_var(words[base + j % 2 * 2 + p] >> T.uint32(8 * (j // 2)))
            T.ptx["lop3.b32"](fragment[j], word, T.uint32(0x007F007F), T.uint32(both(0x4300)), SELECT)
            if has_eighth:
                T.ptx["lop3.b32"](off[0], word, T.uint32(0x00800080), taken_off, SELECT_INVERTED)
                T.ptx[MULTIPLY_ADD["bfloat16"]](fragment[j], fragment[j], one, off[0])
            else:
                T.ptx[MULTIPLY_ADD["bfloat16"]](fragment[j], fragment[j], one, taken_off)

    return decode


def _decode_e4m3(dtype: str, low: bool) -> Any:
    # The seven bits of exponent and significand end up at the wider type's, which ends 3 bits (f16: 1) below the sign. The signs of
    # a word's four codes are taken out once, in their bytes: what a pair has of the others' lies where its seven bits go.
    shift, mask, scale = {"bfloat16": (4, 0x07F0, 0x7B80), "float16": (1, 0x3F80, 0x5C00)}[dtype]
    multiply_add = MULTIPLY_ADD[dtype]

    @T.inline
    def decode(fragment: Expr, words: Expr, base: Expr, s: Expr, p: Expr) -> None:
        signs = T.alloc_local((1,), "uint32")
        for h in T.unroll(2):
            word = T.meta_var(words[base + h * 2 + p])
            signs[0] = word & T.uint32(0x80808080)
            T.ptx["lop3.b32"](fragment[h], T.uint32(both(mask)), word << T.uint32(8 - shift), signs[0] << T.uint32(8), CHOOSE)
            T.ptx["lop3.b32"](fragment[h + 2], T.uint32(both(mask)), word >> T.uint32(shift), signs[0], CHOOSE)
        if not low:
            for j in T.unroll(4):
                T.ptx[multiply_add](fragment[j], fragment[j], T.uint32(both(scale)), T.uint32(NEGATIVE))

    return decode


def transposer(how: Scheme) -> Any:
    """``transpose(words, lane)``: a lane's four words of a chunk, from the layout's order of columns to that of wgmma.

    In the layout a lane has the four pairs of one unit of 8 columns; after it, the lane's own pair of each of the four units that
    the lanes t = 0..3 of a row hold, unit j where pair j was. So the multiplication of index p (:func:`decoder`) covers 16 columns
    in their order, as wgmma reads them from shared memory. A 4 x 4 transposition: two exchanges between lanes that differ in a bit.
    """

    def alternate(own: Expr, other: Expr, odd: Expr) -> Any:
        """Pairs in even bytes of both words in an even lane, pairs in odd bytes in an odd one; the even lane's in even places."""
        return own, other, T.Select(odd, T.uint32(0x3715), T.uint32(0x6240))

    @T.inline
    def nibbles(words: Expr, lane: Expr) -> None:
        other = T.alloc_local((1,), "uint32")
        odd = T.meta_var(lane % 2 == 1)
        keep = T.meta_var(T.Select(odd, T.uint32(0xF0F0F0F0), T.uint32(0x0F0F0F0F)))
        for i in T.unroll(4):
            other[0] = hopper.exchange(words[i], 1)
            other[0] = T.Select(odd, other[0] >> T.uint32(4), other[0] << T.uint32(4))
            words[i] = (words[i] & keep) | (other[0] & ~keep)
            other[0] = hopper.exchange(words[i], 2)
            T.ptx["prmt.b32"](words[i], *alternate(words[i], other[0], lane // 2 % 2 == 1))

    @T.inline
    def bytes_(words: Expr, lane: Expr) -> None:
        other = T.alloc_local((1,), "uint32")
        upper = T.meta_var(lane // 2 % 2 == 1)
        for i in T.unroll(4):
            other[0] = hopper.exchange(words[i], 1)
            T.ptx["prmt.b32"](words[i], *alternate(words[i], other[0], lane % 2 == 1))
        for h in T.unroll(2):
            other[0] = hopper.exchange(T.Select(upper, words[2 * h], words[2 * h + 1]), 2)
            words[2 * h] = T.Select(upper, other[0], words[2 * h])
            words[2 * h + 1] = T.Select(upper, words[2 * h + 1], other[0])

    return nibbles if how.bits <= 4 else bytes_


def as_float(word: Expr, half: Expr, dtype: str) -> Expr:
    """The lower (``half`` 0) or upper (1) 16 bits of ``word`` as the float32 of the same value."""
    if dtype == "bfloat16":
        return T.reinterpret("float32", (word << T.uint32(16 - 16 * half)) & T.uint32(0xFFFF0000))
    bits = T.cast(T.shift_right(word, T.uint32(16 * half)), "uint16")
    return T.cast(T.reinterpret("float16", bits), "float32")
