"""Philox4x64-10 in device code: the random number of a draw, the one that NumPy's generator of the same key and counter makes.

Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


@T.inline
def multiply_wide(product: Any, a: Any, constant: Any) -> None:
    """product[0] + 2^64 product[1] = a * constant, all uint64."""
    mask = T.meta_var(T.uint64(0xFFFFFFFF))
    a0: T.uint64 = T.bitwise_and(a, mask)
    a1: T.uint64 = T.shift_right(a, T.uint64(32))
    p0: T.uint64 = a0 * T.uint64(constant & 0xFFFFFFFF)
    p1: T.uint64 = a0 * T.uint64(constant >> 32)
    p2: T.uint64 = a1 * T.uint64(constant & 0xFFFFFFFF)
    middle: T.uint64 = T.shift_right(p0, T.uint64(32)) + T.bitwise_and(p1, mask) + T.bitwise_and(p2, mask)
    product[0] = T.bitwise_or(T.shift_left(middle, T.uint64(32)), T.bitwise_and(p0, mask))
    product[1] = (
        a1 * T.uint64(constant >> 32)
        + T.shift_right(p1, T.uint64(32))
        + T.shift_right(p2, T.uint64(32))
        + T.shift_right(middle, T.uint64(32))
    )


@T.inline
def uniform(result: Any, key: Any, position: Any) -> None:
    """result[0] = the number in [0, 1) of ``key`` (two uint64, used up) at an int32 position, float64 with 53 random bits."""
    counter = T.alloc_local((4,), "uint64")
    even = T.alloc_local((2,), "uint64")
    odd = T.alloc_local((2,), "uint64")
    # NumPy's generator counts up before it makes a number
    counter[0] = T.cast(position + 1, "uint64")
    counter[1] = T.uint64(0)
    counter[2] = T.uint64(0)
    counter[3] = T.uint64(0)
    for _ in T.serial(ROUNDS):
        multiply_wide(even, counter[0], MULTIPLIERS[0])
        multiply_wide(odd, counter[2], MULTIPLIERS[1])
        counter[0] = T.bitwise_xor(T.bitwise_xor(odd[1], counter[1]), key[0])
        counter[1] = odd[0]
        counter[2] = T.bitwise_xor(T.bitwise_xor(even[1], counter[3]), key[1])
        counter[3] = even[0]
        # a constant beyond int64 cannot be written: the sum modulo 2^64 as a difference
        key[0] = key[0] - T.uint64(2**64 - WEYL[0])
        key[1] = key[1] - T.uint64(2**64 - WEYL[1])
    # TVM writes float64 constants with 15 decimals: a division, since 2^-53 would come out as zero
    result[0] = T.cast(T.shift_right(counter[0], T.uint64(11)), "float64") / T.float64(2.0**53)
