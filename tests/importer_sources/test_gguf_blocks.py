"""Every GGUF block format, bit for bit against the gguf package, on random bytes and with scales at float16's ends."""

import gguf
import numpy as np
import pytest

from llmc.importer.gguf import blocks as gguf_blocks

# where each format keeps its float16 values, in bytes from the block's start (ggml-common.h)
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
EXTREME = np.array([0.0, -0.0, 65504, -65504, 6e-8, -6e-8, 6.1e-5, np.inf, -np.inf, 1.0], np.float16)


def random_blocks(scheme: str, rows: int, per_row: int, extreme: bool) -> np.ndarray:
    """Random bytes ``[rows, per_row * bytes]`` whose float16 fields are finite, or from EXTREME."""
    rng = np.random.default_rng(7)
    size = gguf_blocks.BLOCK_TYPES[scheme].bytes
    blocks = rng.integers(0, 256, (rows * per_row, size), np.uint8)
    for at in SCALES[scheme]:
        values = rng.choice(EXTREME, len(blocks)) if extreme else rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, per_row * size)


def test_every_format_is_covered() -> None:
    assert set(SCALES) == set(gguf_blocks.BLOCK_TYPES)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("scheme", SCALES)
def test_bit_exact(scheme: str, extreme: bool) -> None:
    kind = gguf_blocks.BLOCK_TYPES[scheme]
    quantization = gguf.GGMLQuantizationType[scheme]
    assert gguf.GGML_QUANT_SIZES[quantization] == (kind.elements, kind.bytes)
    raw = random_blocks(scheme, 37, 5, extreme)
    got = gguf_blocks.dequantize(raw, scheme)
    with np.errstate(all="ignore"):
        want = gguf.dequantize(raw, quantization)
    assert got.dtype == np.float32
    assert got.shape == want.shape == (37, 5 * kind.elements)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert extreme or not nan.any()
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def test_more_than_a_chunk_and_leading_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks("Q6_K", 12, 3, False)
    whole = gguf_blocks.dequantize(raw, "Q6_K")
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 7 * 256)
    assert np.array_equal(gguf_blocks.dequantize(raw.reshape(3, 4, -1), "Q6_K"), whole.reshape(3, 4, -1))
