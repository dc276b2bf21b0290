"""The K-quant block formats (256 values, scales quantized once more): bytes ``[n, bytes]`` -> float32 ``[n, 256]``.

A block holds groups of 16 or 32 values with a small integer scale (and minimum) each, over a float16 ``d`` (and ``dmin``) of
the block. Layouts: ggml's ``block_q*_K`` in ``ggml-common.h``; formulas: ``dequantize_row_q*_K`` in ``ggml-quants.c``.
"""

from __future__ import annotations

import numpy as np

_TWO_BIT = np.array([0, 2, 4, 6], np.uint8)[:, None]  # shifts of the four 2-bit fields of a byte


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of every block, as float32 ``[n, 1]``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def two_bits(packed: np.ndarray) -> np.ndarray:
    """2-bit values ``[n, 256]`` of 64 bytes: of each 32 bytes first all lowest pairs of bits, then the next pairs, ..."""
    return ((packed.reshape(-1, 2, 1, 32) >> _TWO_BIT) & 3).reshape(-1, 256)


def four_bits(packed: np.ndarray) -> np.ndarray:
    """4-bit values ``[n, 256]`` of 128 bytes: of each 32 bytes first all low halves, then all high halves."""
    chunks = packed.reshape(-1, 4, 32)
    return np.stack([chunks & 0xF, chunks >> 4], axis=2).reshape(-1, 256)


def six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima, 6 bits each, of 12 bytes; two uint8 ``[n, 8]`` (ggml: ``get_scale_min_k4``)."""
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (rest & 0xF) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return scales, minima


def _grouped(q: np.ndarray, groups: int) -> np.ndarray:
    return q.astype(np.float32).reshape(-1, groups, 256 // groups)


def q2_k(blocks: np.ndarray) -> np.ndarray:
    """scales[16] (4-bit scale, 4-bit minimum), qs[64], d, dmin: ``d s q - dmin m``."""
    packed = blocks[:, 0:16]
    scale = half(blocks, 80) * (packed & 0xF).astype(np.float32)
    minimum = half(blocks, 82) * (packed >> 4).astype(np.float32)
    return (scale[:, :, None] * _grouped(two_bits(blocks[:, 16:80]), 16) - minimum[:, :, None]).reshape(-1, 256)


def q3_k(blocks: np.ndarray) -> np.ndarray:
    """hmask[32], qs[64], scales[12] (16 of 6 bits), d: ``d (s - 32) (q + 4 h - 4)``."""
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 0xF, packed[:, :8] >> 4], axis=1)
    high = ((packed[:, None, 8:12] >> _TWO_BIT) & 3).reshape(-1, 16)
    scale = half(blocks, 108) * ((low | (high << 4)).astype(np.float32) - 32)
    # bit i of hmask's byte j belongs to value 32 i + j
    top = np.unpackbits(blocks[:, 0:32, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    q = (two_bits(blocks[:, 32:96]) | (top << 2)).astype(np.float32) - 4
    return (scale[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


def _scaled_pairs(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``d s q - dmin m`` for the header that Q4_K and Q5_K share: d, dmin, scales[12]."""
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    scale, minimum = half(blocks, 0) * scales.astype(np.float32), half(blocks, 2) * minima.astype(np.float32)
    return (scale[:, :, None] * _grouped(q, 8) - minimum[:, :, None]).reshape(-1, 256)


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """d, dmin, scales[12], qs[128]: ``d s q - dmin m``."""
    return _scaled_pairs(blocks, four_bits(blocks[:, 16:144]))


def q5_k(blocks: np.ndarray) -> np.ndarray:
    """d, dmin, scales[12], qh[32], qs[128]: ``d s q - dmin m``; bit i of qh's byte j is the top bit of value 32 i + j."""
    top = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    return _scaled_pairs(blocks, four_bits(blocks[:, 48:176]) | (top << 4))


def q6_k(blocks: np.ndarray) -> np.ndarray:
    """ql[128], qh[64], scales[16] (int8), d: ``d s (q - 32)``."""
    halves = blocks[:, 0:128].reshape(-1, 2, 64)
    low = np.stack([halves & 0xF, halves >> 4], axis=2).reshape(-1, 256)
    q = (low | (two_bits(blocks[:, 128:192]) << 4)).astype(np.float32) - 32
    scale = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)
