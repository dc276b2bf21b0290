"""GGUF blocks as quantized matrices: codes, scales and minima out of the stored bytes, bit for bit.

The layouts are those of :mod:`.blocks` and :mod:`.k_blocks`; nothing here is rounded, and dequantizing gives the same float32
values. Blocks of 256 keep their two levels of scales: integers of 4 to 8 bits over a float16 of the block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmc.importer.gguf.blocks import BLOCK_TYPES, nibbles
from llmc.importer.gguf.k_blocks import four_bits, six_bit_pairs, two_bits
from llmc.passes.quantize.scheme import QuantizedTensor, scheme

Fields = dict[str, np.ndarray]


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of every block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _q4_0(b: np.ndarray) -> Fields:
    return {"codes": nibbles(b[:, 2:]), "scales": _f16(b, 0)}


def _q4_1(b: np.ndarray) -> Fields:
    return {"codes": nibbles(b[:, 4:]), "scales": _f16(b, 0), "minima": _f16(b, 2)}


def _fifth(b: np.ndarray, at: int) -> np.ndarray:
    return np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> Fields:
    return {"codes": nibbles(b[:, 6:]) | _fifth(b, 2), "scales": _f16(b, 0)}


def _q5_1(b: np.ndarray) -> Fields:
    return {"codes": nibbles(b[:, 8:]) | _fifth(b, 4), "scales": _f16(b, 0), "minima": _f16(b, 2)}


def _q8_0(b: np.ndarray) -> Fields:
    return {"codes": b[:, 2:] ^ 0x80, "scales": _f16(b, 0)}  # signed + 128


def _q2_k(b: np.ndarray) -> Fields:
    return {
        "codes": two_bits(b[:, 16:80]),
        "scales": (b[:, :16] & 0xF).view(np.int8),
        "minima": (b[:, :16] >> 4).view(np.int8),
        "super_scales": _f16(b, 80),
        "super_minima": _f16(b, 82),
    }


def _q3_k(b: np.ndarray) -> Fields:
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 0xF, packed[:, :8] >> 4], axis=1)
    high = ((packed[:, None, 8:12] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(-1, 16)
    top = np.unpackbits(b[:, 0:32, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return {"codes": two_bits(b[:, 32:96]) | (top << 2), "scales": scales, "super_scales": _f16(b, 108)}


def _pairs(b: np.ndarray) -> Fields:
    scales, minima = six_bit_pairs(b[:, 4:16])
    return {
        "scales": scales.view(np.int8),
        "minima": minima.view(np.int8),
        "super_scales": _f16(b, 0),
        "super_minima": _f16(b, 2),
    }


def _q4_k(b: np.ndarray) -> Fields:
    return {"codes": four_bits(b[:, 16:144]), **_pairs(b)}


def _q5_k(b: np.ndarray) -> Fields:
    top = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    return {"codes": four_bits(b[:, 48:176]) | (top << 4), **_pairs(b)}


def _q6_k(b: np.ndarray) -> Fields:
    halves = b[:, 0:128].reshape(-1, 2, 64)
    low = np.stack([halves & 0xF, halves >> 4], axis=2).reshape(-1, 256)
    return {
        "codes": low | (two_bits(b[:, 128:192]) << 4),
        "scales": np.ascontiguousarray(b[:, 192:208]).view(np.int8),
        "super_scales": _f16(b, 208),
    }


_FIELDS: dict[str, Callable[[np.ndarray], Fields]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _q4_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def unpack(blocks: np.ndarray, block_type: str) -> QuantizedTensor:
    """The matrix whose stored rows are ``blocks``, uint8 [o, bytes of a row], of the block type (``"Q4_K"``)."""
    kind = BLOCK_TYPES[block_type]
    fields = _FIELDS[block_type](np.ascontiguousarray(blocks).reshape(-1, kind.bytes))
    rows = {name: np.ascontiguousarray(value.reshape(len(blocks), -1)) for name, value in fields.items()}
    codes, scales = rows.pop("codes"), rows.pop("scales")
    return QuantizedTensor(scheme(block_type.lower()), codes, scales, **rows)
