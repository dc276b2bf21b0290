"""config.json that cannot be compiled from: each reason in one sentence, naming what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.huggingface.config import load_config, load_quantization


def folder_with(folder: Path, config: dict[str, Any] | str) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config.json is not valid JSON"),
        ("[1]", r"holds a JSON list, not an object"),
        ("{}", r"has no model_type"),
        ({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}, r"refused by transformers as a llama config: .*65"),
        ({"model_type": "llama", "vocab_size": "many"}, r"refused by transformers as a llama config: .*vocab_size"),
        ({"model_type": "llama", "dtype": "float99"}, r"refused by transformers as a llama config: .*float99"),
    ],
)
def test_broken(tmp_path: Path, config: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(folder_with(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "brandnew"}, r"model_type 'brandnew', which transformers 5\S+ does not know: install"),
        ({"model_type": "brandnew", "auto_map": {"AutoConfig": "a.B"}}, r"own Python code, which llmc never runs"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            r"BertForMaskedLM \(model_type 'bert'\), which does not predict",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            r"T5ForConditionalGeneration .* an encoder-decoder",
        ),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, r"no causal language model class"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, r"LlamaForSequenceClassification"),
        (
            {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            r"for its text part \('qwen2_5_vl_text'\)",
        ),
    ],
)
def test_unsupported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load_config(folder_with(tmp_path, config))


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        load_config(tmp_path)


def test_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    config, is_part = load_config(
        folder_with(tmp_path, {"model_type": "llava", "text_config": {"model_type": "mistral", "vocab_size": 99}})
    )
    assert is_part
    assert (config.model_type, config.vocab_size) == ("mistral", 99)


def test_plain_model(tmp_path: Path) -> None:
    config, is_part = load_config(
        folder_with(tmp_path, {"model_type": "gpt2", "n_embd": 60, "n_head": 6, "architectures": ["GPT2LMHeadModel"]})
    )
    assert not is_part
    assert config.hidden_size == 60


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, {}, {"quant_method": "awq"}),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}, {"quant_method": "fp8"}),
        ({}, {"quantize_config.json": {"bits": 4}}, {"quant_method": "gptq", "bits": 4}),
        ({}, {}, None),
    ],
)
def test_quantization(tmp_path: Path, config: dict[str, Any], files: dict[str, Any], expected: dict[str, Any] | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_quantization(folder_with(tmp_path, {"model_type": "llama", **config})) == expected
