"""Checkpoints of many families bound to meta-device models: every tensor bit for bit what transformers saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.errors import ModelError
from llmc.importer.binding import to_torch
from llmc.importer.huggingface.model import HuggingFaceModel
from llmc.importer.params import Mapped
from llmc.importer.source import Binding

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 71,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "vocab_size": 71,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mixtral": {**SIZES, "num_local_experts": 3},
    "qwen3_moe": {**SIZES, "num_experts": 3, "moe_intermediate_size": 24, "head_dim": 16},
    "phi3": SIZES,
    "gpt2": GPT2,
    "gemma2": {**SIZES, "head_dim": 16},
    "gpt_neox": SIZES,
    "jamba": {**SIZES, "num_experts": 2},
    "gpt_oss": {**SIZES, "num_local_experts": 3, "head_dim": 16},
}


def random_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def bound(folder: Path) -> tuple[Any, Binding]:
    source = HuggingFaceModel(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    return model, source.bind(model)


def assert_equal(binding: Binding, want: dict[str, torch.Tensor]) -> None:
    """Every tensor of ``want`` is in the binding, itself or through its tie, with the same dtype and bits."""
    assert set(binding.table) | set(binding.tied) == set(want)
    for name, tensor in want.items():
        param = binding.table[binding.tied.get(name, name)]
        array = param.source.read()
        assert array.flags.c_contiguous
        assert array.shape == param.shape
        got = to_torch(array)
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_exact(family: str, tie: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if tie else torch.float32
    saved = random_model(family, dtype, tie_word_embeddings=tie)
    saved.save_pretrained(tmp_path, max_shard_size="20KB" if tie else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == tie
    _, binding = bound(tmp_path)
    assert not binding.missing
    assert not binding.unused
    assert ("lm_head.weight" in binding.tied or "embed_out.weight" in binding.tied) == tie
    assert_equal(binding, saved.state_dict())
    expert_weights = [p for p in binding.table.values() if isinstance(p.source, Mapped)]
    assert bool(expert_weights) == (family in ("mixtral", "qwen3_moe", "jamba"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = random_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    return tmp_path, model.state_dict()


def test_missing_and_unused_are_listed(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = llama
    rewrite(folder, lambda t: {("extra.weight" if n == "model.norm.weight" else n): v for n, v in t.items()})
    _, binding = bound(folder)
    assert binding.missing == ["model.norm.weight"]
    assert binding.unused == ["extra.weight"]


def test_old_rope_buffers_are_ignored(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = llama
    rewrite(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    _, binding = bound(folder)
    assert not binding.unused
    assert_equal(binding, state)


def test_shape_mismatch_names_both_shapes_and_the_file(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = llama
    rewrite(folder, lambda t: {**t, "model.norm.weight": torch.ones(47)})
    with pytest.raises(ModelError, match=r"model.safetensors:model.norm.weight is \[47\] and model.norm.weight must be \[48\]"):
        bound(folder)


def test_base_model_checkpoint_gets_the_prefix(tmp_path: Path) -> None:
    model = random_model("gpt2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {n.removeprefix("transformer."): v for n, v in t.items()})
    _, binding = bound(tmp_path)
    assert_equal(binding, model.state_dict())


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stored_twice(tmp_path: Path, equal: bool) -> None:
    saved = random_model("llama", tie_word_embeddings=True)
    saved.save_pretrained(tmp_path)
    head = saved.lm_head.weight.detach().clone()
    if not equal:
        head[70, 47] += 1
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": head})
    model, binding = bound(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert binding.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if equal else {})
    assert_equal(binding, {**saved.state_dict(), "lm_head.weight": head})


def test_only_the_tied_name_is_stored(tmp_path: Path) -> None:
    saved = random_model("llama", tie_word_embeddings=True)
    saved.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {("lm_head.weight" if n == "model.embed_tokens.weight" else n): v for n, v in t.items()})
    _, binding = bound(tmp_path)
    assert binding.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert_equal(binding, saved.state_dict())


def test_missing_expert_is_reported(tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if not n.endswith("layers.1.block_sparse_moe.experts.2.w2.weight")})
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.experts.down_proj must be \[3, 48, 40\]"):
        bound(tmp_path)


@pytest.mark.parametrize("layout", ["model.language_model.{}", "language_model.model.{}"])
def test_text_part_of_a_multimodal_checkpoint(tmp_path: Path, layout: str) -> None:
    text = {**SIZES, "head_dim": 16, "vocab_size": 300}
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, architectures=["Gemma3ForConditionalGeneration"]
    )
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(config.text_config)
    tensors = {
        layout.format(name.removeprefix("model.")): t.clone()
        for name, t in language.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file({**tensors, "vision_tower.embeddings.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    _, binding = bound(tmp_path)
    assert binding.unused == ["vision_tower.embeddings.weight"]
    assert not binding.missing
    assert_equal(binding, language.state_dict())
