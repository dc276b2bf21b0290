"""GGUF blocks as codes and scales: the same values bit for bit, for every block type, joined and permuted."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.importer.gguf.blocks import BLOCK_TYPES, dequantize
from llmc.importer.gguf.quantized import unpack
from llmc.passes.quantize.scheme import concatenated, scheme


def random_blocks(block_type: str, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    """Random bytes whose float16 scales are finite: uint8 [rows, bytes]."""
    kind = BLOCK_TYPES[block_type]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * per_row, kind.bytes), dtype=np.uint8)
    offsets = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for at in offsets.get(block_type, (0,)):
        blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_values_are_those_of_the_blocks(block_type: str) -> None:
    blocks = random_blocks(block_type, 6, 3)
    expected = dequantize(blocks, block_type)
    tensor = unpack(blocks, block_type)
    assert tensor.scheme is scheme(block_type.lower())
    assert int(tensor.codes.max()) < 1 << tensor.scheme.bits
    np.testing.assert_array_equal(tensor.dequantize(), expected)
    flat = tensor.flat()
    assert not flat.scheme.super_group
    np.testing.assert_array_equal(flat.dequantize(), expected)
    order = np.array([4, 0, 0, 5])
    np.testing.assert_array_equal(
        concatenated([tensor.take(order), tensor]).dequantize(), np.concatenate([expected[order], expected])
    )


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_bits_per_weight_are_those_of_the_file(block_type: str) -> None:
    kind = BLOCK_TYPES[block_type]
    assert scheme(block_type.lower()).bits_per_weight(512) == pytest.approx(8 * kind.bytes / kind.elements)
