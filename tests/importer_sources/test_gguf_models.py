"""GGUF files bound to meta-device models: values bit for bit those that transformers itself loads from the same file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightConverter
from transformers.integrations.gguf.gguf_conversion_mapping import PermuteRows, SubtractOne
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.binding import bind_sources, to_torch
from llmc.importer.gguf.file import GGUFSource, open_gguf
from llmc.importer.gguf.model import GGUFModel
from llmc.importer.params import Mapped
from llmc.importer.rows import Rows
from llmc.importer.source import Binding
from tests.importer_sources.gguf_writer import gguf_tensors, write_gguf

TOKENS = [f"t{i}" for i in range(77)]
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 77,
    "max_position_embeddings": 128,
}
KEYS: dict[str, Any] = {
    "context_length": 128,
    "block_count": 2,
    "feed_forward_length": 64,
    "embedding_length": 96,
    "attention.head_count": 6,
    "attention.head_count_kv": 3,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
Tensors = dict[str, np.ndarray]


def transposed_linears(tensors: Tensors, model: Any) -> Tensors:
    linear = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    return {n: t.T if n.endswith(linear) else t for n, t in tensors.items()}


def split_experts(tensors: Tensors, model: Any) -> Tensors:
    out = {n: t for n, t in tensors.items() if not n.endswith("_exps")}
    for i, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.detach().numpy().reshape(4, 2, 32, 96).transpose(1, 0, 2, 3)
        out |= {f"blk.{i}.ffn_gate_exps.weight": gate, f"blk.{i}.ffn_up_exps.weight": up}
        out[f"blk.{i}.ffn_down_exps.weight"] = layer.mlp.experts.down_proj.detach().numpy()
    return out


@dataclass
class Case:
    """A model type, its GGUF name, what differs from SIZES and KEYS, and what llama.cpp's converter does to the tensors."""

    model_type: str
    architecture: str
    sizes: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    convert: Callable[[Tensors, Any], Tensors] = lambda tensors, model: tensors


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MOE_KEYS = {"attention.key_length": 16, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
CASES = {
    c.model_type: c
    for c in (
        Case("llama", "llama", keys={"rope.dimension_count": 16}),
        Case("qwen2", "qwen2"),
        Case("gemma2", "gemma2", {"head_dim": 16}, {"attention.key_length": 16, "attn_logit_softcapping": 30.0}),
        Case("gpt2", "gpt2", convert=transposed_linears),
        Case("bloom", "bloom"),
        Case("stablelm", "stablelm", keys={"rope.dimension_count": 8}),
        Case("qwen3_moe", "qwen3moe", MOE, MOE_KEYS, split_experts),
    )
}


def write(case: Case, path: Path, block: str | None = "Q8_0", **metadata: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(case.model_type, **{**SIZES, **case.sizes}, tie_word_embeddings=False)
    )
    keys = {f"{case.architecture}.{key}": value for key, value in {**KEYS, **case.keys}.items()}
    tensors = case.convert(gguf_tensors(model, case.architecture, 2, {}), model)
    return write_gguf(path, case.architecture, {"tokenizer.ggml.tokens": TOKENS, **keys, **metadata}, tensors, block)


def bound(path: Path) -> tuple[GGUFModel, Any, Binding]:
    source = GGUFModel(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    return source, model, source.bind(model)


def assert_as_transformers(path: Path, model: Any, binding: Binding) -> None:
    want = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert set(binding.table) == set(want)
    for name, tensor in want.items():
        array = binding.table[name].source.read()
        assert array.dtype == np.float32
        assert array.shape == tuple(tensor.shape) == tuple(model.state_dict()[name].shape)
        assert np.array_equal(array.view(np.uint32), tensor.numpy().view(np.uint32)), name


@pytest.mark.parametrize("model_type", CASES)
def test_as_transformers(model_type: str, tmp_path: Path) -> None:
    path = write(CASES[model_type], tmp_path / "x.gguf")
    _, model, binding = bound(path)
    assert not binding.missing
    assert not binding.unused
    assert_as_transformers(path, model, binding)


def test_new_generation_of_conversions(tmp_path: Path) -> None:
    """LFM2 goes through transformers' conversion lists: only names and one reshape, so the written weights must come back."""
    sizes = {**SIZES, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"], "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **sizes))
    keys = {**KEYS, "attention.head_count_kv": [0, 3], "shortconv.l_cache": 3}
    tensors = {n: t[:, 0] if t.ndim == 3 else t for n, t in gguf_tensors(model, "lfm2", 2, {}).items()}
    metadata = {"tokenizer.ggml.tokens": TOKENS, **{f"lfm2.{k}": v for k, v in keys.items()}}
    source, _, binding = bound(write_gguf(tmp_path / "x.gguf", "lfm2", metadata, tensors))
    assert source.dtype == "float32"
    state = model.state_dict()
    assert set(binding.table) == set(state)
    for name, tensor in state.items():
        assert torch.equal(to_torch(binding.table[name].source.read()), tensor), name


def test_fields_that_transformers_leaves_out(tmp_path: Path) -> None:
    config = GGUFModel(write(CASES["gemma2"], tmp_path / "a.gguf")).config
    assert config.attn_logit_softcapping == 30.0
    config = GGUFModel(write(CASES["stablelm"], tmp_path / "b.gguf")).config
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    config = GGUFModel(write(CASES["qwen3_moe"], tmp_path / "c.gguf")).config
    assert (config.moe_intermediate_size, config.num_experts, config.norm_topk_prob) == (32, 4, True)
    config = GGUFModel(write(CASES["gpt2"], tmp_path / "d.gguf")).config
    assert config.n_positions == 128
    assert config.vocab_size == 77


def test_blocks_survive_row_permutation(tmp_path: Path) -> None:
    path = write(CASES["llama"], tmp_path / "x.gguf", "Q4_0")
    source, _, binding = bound(path)
    assert source.dtype == "float16"
    q = binding.table["model.layers.1.self_attn.q_proj.weight"].source
    assert isinstance(q, Rows)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.attn_q.weight"]
    rows = gguf.dequantize(stored.data, gguf.GGMLQuantizationType.Q4_0)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, q.read()))
    assert np.array_equal(q.quantized().dequantize(), q.read())
    kinds = Counter(type(p.source) for p in binding.table.values() if len(p.shape) == 2)
    assert kinds == {GGUFSource: 12, Rows: 4}


def test_conversions_that_only_move_rows_keep_blocks(tmp_path: Path) -> None:
    """The conversions of transformers' new GGUF path, on a block tensor: row order survives in blocks, arithmetic does not."""
    path = write(CASES["llama"], tmp_path / "x.gguf")
    _, model, _ = bound(path)
    stored = open_gguf(path).tensors["output.weight"]
    order = np.random.default_rng(0).permutation(77)
    for operation, kind in ((PermuteRows(torch.from_numpy(order)), Rows), (SubtractOne(), Mapped)):
        converter = WeightConverter(r"output\.weight", "lm_head.weight", [operation])
        source = bind_sources(model, {"output.weight": stored}, [converter], "x.gguf").table["lm_head.weight"].source
        assert type(source) is kind
        assert source.shape == (77, 96)
        if isinstance(source, Rows):
            assert np.array_equal(source.read(), stored.read()[order])
        else:
            assert np.array_equal(source.read(), stored.read() - 1)


def test_shape_mismatch_is_named(tmp_path: Path) -> None:
    path = write(Case("llama", "llama", {"intermediate_size": 96}), tmp_path / "x.gguf")
    with pytest.raises(
        ModelError, match=r"x.gguf:blk.0.ffn_gate.weight is \[96, 96\] and model.layers.0.mlp.gate_proj.weight must be \[64, 96\]"
    ):
        bound(path)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "rwkv6", {"rwkv6.block_count": 2}, {"a": np.zeros((2, 2), np.float32)})
    with pytest.raises(UnsupportedError, match=r"architecture 'rwkv6', for which transformers has no GGUF mapping \(it has bloom"):
        GGUFModel(path)


def test_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    a = GGUFModel(write(CASES["llama"], tmp_path / "a.gguf"))
    b = GGUFModel(write(CASES["llama"], tmp_path / "b.gguf", "Q4_0"))
    assert a.fingerprint() == GGUFModel(tmp_path / "a.gguf").fingerprint() != b.fingerprint()


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[GGUFModel, Any, Binding]:
    return bound(smollm2_gguf)


def test_smollm2(smollm2: tuple[GGUFModel, Any, Binding]) -> None:
    """Every name, and the values of the first and last layers against the gguf package and llama.cpp's permutation, inverted."""
    source, _, binding = smollm2
    assert (source.dtype, source.config.rope_parameters["rope_theta"]) == ("float16", 100000.0)
    assert binding.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not binding.missing
    assert not binding.unused
    assert Counter(p.source.scheme for p in binding.table.values()) == {"Q4_1": 210, "float32": 61, "Q8_0": 1}
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    names |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    checked = 0
    for tensor in gguf.GGUFReader(source.path).tensors:
        block, layer, leaf = (*tensor.name.split("."), "", "")[:3]
        if block != "blk" or layer not in ("0", "29"):
            continue
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        if leaf in ("attn_q", "attn_k"):
            want = want.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        got = binding.table[f"model.layers.{layer}.{names[leaf]}.weight"].source.read()
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), tensor.name
        checked += 1
    assert checked == 18


@pytest.mark.slow
def test_smollm2_as_transformers(smollm2: tuple[GGUFModel, Any, Binding]) -> None:
    source, model, binding = smollm2
    assert_as_transformers(source.path, model, binding)
