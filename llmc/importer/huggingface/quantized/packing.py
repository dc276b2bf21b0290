"""Codes out of 32-bit words: consecutive fields of a few bits, the lowest bits of a word first."""

from __future__ import annotations

import numpy as np

_ROWS = 1 << 21  # codes unpacked in one go where fields cross words: eight bytes of memory for each


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` fields of ``bits`` bits of every row: int32 [n, w] -> uint8 [n, count]. Fields may cross words."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return np.ascontiguousarray(fields.reshape(len(packed), -1)[:, :count])
    out = np.empty((len(packed), count), np.uint8)
    step = max(1, _ROWS // max(1, count))
    for start in range(0, len(packed), step):
        stream = np.unpackbits(packed[start : start + step], axis=1, count=count * bits, bitorder="little")
        fields = stream.reshape(-1, count, bits)
        out[start : start + step] = np.packbits(fields, axis=2, bitorder="little")[:, :, 0]
    return out


def ones(bits: int) -> np.ndarray:
    """The shortest run of whole words whose every field holds a 1: uint32 [bits / gcd(bits, 32)]."""
    length = bits // int(np.gcd(bits, 32))
    fields = np.zeros((length * 32 // bits, bits), np.uint8)
    fields[:, 0] = 1
    return np.packbits(fields.reshape(-1), bitorder="little").view("<u4")


def word_count(count: int, bits: int) -> int:
    """Words that ``count`` fields take."""
    return -(-count * bits // 32)
