"""The block formats of GGUF files as NumPy: sizes, and exact float32 values from the stored bytes.

Layouts and formulas are those of ggml's ``ggml-quants.c`` (``dequantize_row_*``); products and sums are taken in float32 in the
same order, so the values are equal bit for bit. In the comments, ``d`` and ``m`` are a block's float16 scale and minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmc.importer.gguf import k_blocks
from llmc.importer.gguf.k_blocks import half

_CHUNK = 1 << 20  # elements decoded in one go: temporaries stay a few tens of MB, whatever the tensor's size

# the 16 values an IQ4_NL nibble stands for (ggml: kvalues_iq4nl)
IQ4_NL_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """``[n, 16]`` bytes as ``[n, 32]`` values: all low halves, then all high halves."""
    return np.concatenate([packed & 0xF, packed >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """The 32 bits from byte ``at``, each as 0 or 16: the top bit of 5-bit values, uint8 ``[n, 32]``."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * (nibbles(blocks[:, 2:]).astype(np.float32) - 8)  # d (q - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * nibbles(blocks[:, 4:]).astype(np.float32) + half(blocks, 2)  # d q + m


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    q = nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return half(blocks, 0) * (q.astype(np.float32) - 16)  # d (q - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    q = nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return half(blocks, 0) * q.astype(np.float32) + half(blocks, 2)  # d q + m


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)  # d q


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * IQ4_NL_VALUES[nibbles(blocks[:, 2:])]  # d v[q]


@dataclass(frozen=True)
class BlockType:
    """A block format: ``elements`` values in ``bytes`` bytes. ``decode``: uint8 ``[n, bytes]`` -> float32 ``[n, elements]``."""

    name: str
    elements: int
    bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


BLOCK_TYPES: dict[str, BlockType] = {
    b.name: b
    for b in (
        BlockType("Q4_0", 32, 18, _q4_0),
        BlockType("Q4_1", 32, 20, _q4_1),
        BlockType("Q5_0", 32, 22, _q5_0),
        BlockType("Q5_1", 32, 24, _q5_1),
        BlockType("Q8_0", 32, 34, _q8_0),
        BlockType("IQ4_NL", 32, 18, _iq4_nl),
        BlockType("Q2_K", 256, 84, k_blocks.q2_k),
        BlockType("Q3_K", 256, 110, k_blocks.q3_k),
        BlockType("Q4_K", 256, 144, k_blocks.q4_k),
        BlockType("Q5_K", 256, 176, k_blocks.q5_k),
        BlockType("Q6_K", 256, 210, k_blocks.q6_k),
    )
}


def dequantize(blocks: np.ndarray, scheme: str) -> np.ndarray:
    """The values, float32 ``[..., columns]``, of stored rows, uint8 ``[..., bytes_per_row]``, of the block type ``scheme``."""
    kind = BLOCK_TYPES[scheme]
    flat = blocks.reshape(-1, kind.bytes)
    out = np.empty((len(flat), kind.elements), np.float32)
    step = _CHUNK // kind.elements
    # scales at float16's ends overflow or underflow on purpose here, just as in ggml
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(flat), step):
            out[start : start + step] = kind.decode(np.ascontiguousarray(flat[start : start + step]))
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] // kind.bytes * kind.elements)
