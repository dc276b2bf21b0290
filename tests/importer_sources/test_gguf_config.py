"""Rope scaling from GGUF files: the frequencies that transformers computes from our parameters are those the file states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.gguf.model import GGUFModel
from tests.importer_sources.gguf_writer import write_gguf

THETA, HEAD, CONTEXT = 500000.0, 64, 131072
BASE: dict[str, Any] = {
    "llama.context_length": CONTEXT,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.embedding_length": 4 * HEAD,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": THETA,
    "llama.rope.dimension_count": HEAD,
    "llama.vocab_size": 300,
}
PLAIN = THETA ** (-np.arange(0, HEAD, 2) / HEAD)


def config_of(path: Path, tensors: dict[str, np.ndarray] | None = None, **metadata: Any) -> Any:
    keys = {f"llama.rope.scaling.{k}": v for k, v in metadata.items()}
    return GGUFModel(
        write_gguf(path / "x.gguf", "llama", {**BASE, **keys}, tensors or {"output.weight": np.zeros((1, 1), np.float32)})
    ).config


def frequencies(config: Any, length: int = 100) -> tuple[np.ndarray, float]:
    inv_freq, attention = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    return inv_freq.numpy(), attention


def llama3_factors(factor: float, low: float, high: float, original: int) -> np.ndarray:
    """llama.cpp's converter (convert_hf_to_gguf.py, rope_freqs): the loop of the reference implementation."""
    factors = []
    for frequency in PLAIN:
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(("factor", "original", "kind"), [(8.0, 8192, "llama3"), (32.0, 8192, "llama3"), (8.0, 4096, "longrope")])
def test_frequency_factors(tmp_path: Path, factor: float, original: int, kind: str) -> None:
    factors = llama3_factors(factor, 1.0, 4.0, original)
    config = config_of(tmp_path, {"rope_freqs.weight": factors})
    assert config.rope_parameters["rope_type"] == kind
    for length in (100, CONTEXT):
        found, attention = frequencies(config, length)
        np.testing.assert_allclose(found, PLAIN / factors, rtol=1e-4)
        assert attention == 1.0


def test_long_and_short_factors(tmp_path: Path) -> None:
    long, short = np.linspace(2, 9, HEAD // 2, dtype=np.float32), np.linspace(1, 2, HEAD // 2, dtype=np.float32)
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    config = config_of(tmp_path, tensors, original_context_length=4096, attn_factor=1.19)
    np.testing.assert_allclose(frequencies(config, 100)[0], PLAIN / short, rtol=1e-5)
    found, attention = frequencies(config, 9000)
    np.testing.assert_allclose(found, PLAIN / long, rtol=1e-5)
    assert attention == pytest.approx(1.19)


def test_linear(tmp_path: Path) -> None:
    config = config_of(tmp_path, type="linear", factor=4.0)
    np.testing.assert_allclose(frequencies(config)[0], PLAIN / 4, rtol=1e-5)


def test_yarn(tmp_path: Path) -> None:
    config = config_of(tmp_path, type="yarn", factor=4.0, original_context_length=32768)
    parameters = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
    assert parameters == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found, attention = frequencies(config)
    np.testing.assert_allclose([found[0], found[-1]], [PLAIN[0], PLAIN[-1] / 4], rtol=1e-4)
    assert attention == pytest.approx(0.1 * np.log(4) + 1)


def test_none(tmp_path: Path) -> None:
    assert config_of(tmp_path, type="none").rope_parameters == {"rope_theta": THETA, "rope_type": "default"}


def test_unknown_scaling(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"scales rope by 'spiral', which llmc does not know"):
        config_of(tmp_path, type="spiral", factor=2.0)


def test_metadata_without_what_the_model_needs(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "lfm2", {"lfm2.block_count": 2}, {"a": np.zeros((1, 1), np.float32)})
    with pytest.raises(ModelError, match=r"lacks what a 'lfm2' model needs \('lfm2.attention.head_count_kv'\)"):
        GGUFModel(path)
