"""Quantized checkpoints through the whole compiler: logits are those of transformers on the weights they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmc
from llmc.compiler import CompileReport
from llmc.compiler import compile as compile_model
from llmc.reference import reference_model
from tests.support import quantized_checkpoints as made
from tests.support.tiny_models import VOCAB

SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ROUNDED = 3e-2
"""Relative error of logits where kernels round activations to 8 bits, on a model of random weights."""
EXACT = 2e-5
"""The same where activations stay floats."""


def logits_error(artifact: Path, floats: Path) -> float:
    """Of all logits of a sequence, in the Frobenius norm, against transformers on the model in ``floats``."""
    reference = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [int(i) for i in np.random.default_rng(3).integers(0, VOCAB, 29)]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    with llmc.load(artifact) as model:
        found = model.logits(ids)
        assert len(model.generate(ids[:5], max_tokens=4, ignore_eos=True).token_ids) == 4
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compiled(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The report's rows by name."""
    report: CompileReport = compile_model(str(folder), out=out, page_size=4, **options)
    return {row.name: row for row in report.weights}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
CASES: dict[str, tuple[str, made.Packer, dict[str, Any], str, float]] = {
    "gptq_act_order": ("llama", made.gptq(symmetric=False, act_order=True), GPTQ, "int4p_g32", ROUNDED),
    "awq": ("qwen3", made.awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "int4p_g32", ROUNDED),
    "fp8_blocks": (
        "llama",
        made.fp8("block", "weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8_e4m3_b128",
        EXACT,
    ),
    "nf4": ("llama", made.nf4(), {"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4_g64_f32", EXACT),
}


@pytest.mark.slow  # the tutorial's test runs one of them by default
@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model_type, pack, config, scheme, tolerance = CASES[name]
    folder, floats = made.quantize_folder(tiny_model_dir(model_type, **SIZES), tmp_path, made.linears(pack), config)
    rows = compiled(folder, tmp_path / "out")
    for part in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"):
        row = rows[f"model.layers.*.{part}.weight"]
        assert (row.scheme, row.error, row.reason) == (scheme, 0.0, "")
    assert rows["lm_head.weight"].scheme == "float32"
    assert logits_error(tmp_path / "out", floats) < tolerance


def test_the_reference_of_a_quantized_checkpoint_has_its_dequantized_weights(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    replace = made.linears(made.gptq(symmetric=False, act_order=True))
    folder, floats = made.quantize_folder(tiny_model_dir("mixtral", **SIZES), tmp_path, replace, GPTQ)
    ids = list(range(1, 12))
    np.testing.assert_allclose(reference_model(str(folder)).logits(ids), reference_model(str(floats)).logits(ids), atol=1e-5)


@pytest.mark.slow
def test_layers_without_quantization_stay_and_others_can_be_rounded_anew(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    replace = made.linears(made.pack_quantized(act_order=True), "v_proj")
    config = made.compressed_config("pack-quantized")
    folder, floats = made.quantize_folder(tiny_model_dir("llama", **SIZES), tmp_path, replace, config)
    rows = compiled(folder, tmp_path / "out", keep=["down_proj=int8", "o_proj=none"], quant=None)
    assert rows["model.layers.*.self_attn.q_proj+k_proj.weight"].scheme == "int4_g32_bf16"
    assert rows["model.layers.*.self_attn.v_proj.weight"].scheme == "float32"
    assert rows["model.layers.*.self_attn.o_proj.weight"].scheme == "float32"
    assert rows["model.layers.*.mlp.down_proj.weight"].scheme == "int8_g32"  # int8, on a CPU
    assert 0 < rows["model.layers.*.mlp.down_proj.weight"].error < 1e-2
    assert logits_error(tmp_path / "out", floats) < ROUNDED


EXPERTS: dict[str, tuple[str, dict[str, int], made.Replace, dict[str, Any], str, float]] = {
    "gptq": ("mixtral", {}, made.linears(made.gptq(symmetric=False)), {**GPTQ, "desc_act": False}, "int4p_g32", ROUNDED),
    "fp8": (
        "qwen3_moe",
        {"moe_intermediate_size": 96},
        made.linears(made.fp8("block", "weight_scale_inv")),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8_e4m3_b128",
        EXACT,
    ),
    "mxfp4": ("gpt_oss", {}, made.mxfp4_experts, {"quant_method": "mxfp4"}, "mxfp4", EXACT),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model_type, sizes, replace, config, scheme, tolerance = EXPERTS[name]
    folder, floats = made.quantize_folder(tiny_model_dir(model_type, **SIZES, **sizes), tmp_path, replace, config)
    rows = compiled(folder, tmp_path / "out")
    experts = [row for row in rows.values() if ".experts." in row.name and "bias" not in row.name]
    assert [(row.scheme, row.error, row.reason) for row in experts] == [(scheme, 0.0, "")] * 2
    assert logits_error(tmp_path / "out", floats) < tolerance


@pytest.mark.slow
def test_experts_of_floats_are_rounded(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    rows = compiled(tiny_model_dir("gpt_oss", **SIZES), tmp_path / "out", quant="int4")
    left = {
        row.name for row in rows.values() if row.scheme.startswith("float") and "bias" not in row.name and "vectors" not in row.name
    }
    assert left == {"model.layers.*.mlp.router.weight"}
    assert "picks the experts" in rows["model.layers.*.mlp.router.weight"].reason
    with llmc.load(tmp_path / "out") as model:
        assert np.isfinite(model.logits(list(range(9)))).all()
