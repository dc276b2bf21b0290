"""The imported graph computes what transformers computes: every family, through the NumPy interpreter, before any pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.dialect import interpreter
from llmc.errors import ModelError, UnsupportedError
from llmc.importer.model import ImportedModel, import_model
from llmc.importer.resolve import resolve
from tests.support.tiny_models import MODELS, VOCAB

LENGTHS = (2, 19)  # 19 exceeds every window of the tiny models


def imported(folder: Path, **options: Any) -> ImportedModel:
    return import_model(resolve(str(folder)), storage_dtype="float32", **{"context": 128, **options})


def logits_of(model: ImportedModel, ids: np.ndarray) -> np.ndarray:
    positions = np.arange(len(ids), dtype=np.int32)
    weights = [p.source.read() for p in model.params.values()]
    return interpreter.run(model.mod, [ids.astype(np.int32), positions, *weights])


def reference_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def assert_same(folder: Path, model: ImportedModel, seed: int = 0) -> None:
    for length in LENGTHS:
        ids = np.random.default_rng(seed).integers(0, VOCAB, length)
        expected = reference_logits(folder, ids)
        found = logits_of(model, ids)
        assert found.shape == (length, VOCAB)
        # Rope tables and router softmaxes are float32 in transformers whatever the model's dtype.
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_logits_equal_transformers(model_type: str, tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(model_type)
    assert_same(folder, imported(folder))


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 3.0, 5.0],
    "original_max_position_embeddings": 16,
    "factor": 8.0,
}


def test_longrope_follows_the_compiled_context(tiny_model_dir: Callable[..., Path]) -> None:
    """transformers picks the factors by the longest position in the batch; an artifact picks them once, by its context."""
    folder = tiny_model_dir("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=16)
    short, long = imported(folder, context=16), imported(folder, context=64)
    for model, length in ((short, 13), (long, 21)):
        ids = np.random.default_rng(1).integers(0, VOCAB, length)
        np.testing.assert_allclose(logits_of(model, ids), reference_logits(folder, ids), rtol=1e-3, atol=2e-4)
    ids = np.random.default_rng(1).integers(0, VOCAB, 13)
    assert np.abs(logits_of(short, ids) - logits_of(long, ids)).max() > 1e-3


def test_storage_dtype_is_for_matrices_only(tiny_model_dir: Callable[..., Path]) -> None:
    model = import_model(resolve(str(tiny_model_dir("qwen2"))), storage_dtype="bfloat16", context=32)
    for param in model.params.values():
        expected = "bfloat16" if len(param.shape) >= 2 else "float32"
        assert param.dtype == expected, param.name


def test_a_computed_bias_on_the_scores_is_refused_with_its_place(tmp_path: Path) -> None:
    """Bloom adds ALiBi slopes outside the attention interface."""
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=60, n_layer=2, n_head=3)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        imported(tmp_path)
    message = str(caught.value)
    assert "transformer.h.0.self_attention" in message and "aten.baddbmm" in message and "float32[3" in message
    assert "1 more places" in message  # the second layer is counted, not listed


def test_missing_and_spare_tensors_are_all_named(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny_model_dir("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.other_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError) as caught:
        imported(tmp_path)
    message = str(caught.value)
    assert "lacks 2 parameters" in message
    for name in ("layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_proj.weight", "layers.0.mlp.other_proj.weight"):
        assert name in message


def test_spare_tensors_alone_are_reported_and_harmless(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny_model_dir("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = imported(tmp_path)
    assert model.unused == ["model.extra.weight"]
    assert_same(folder, model)


def test_a_checkpoint_that_stores_both_halves_of_a_tie_differently_unties_them(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers believes the checkpoint over the config; so must the graph."""
    from safetensors.numpy import load_file, save_file

    folder = tiny_model_dir("qwen2", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = imported(tmp_path)
    assert "lm_head.weight" in model.params
    assert_same(tmp_path, model)
