"""Every quantized checkpoint format: the weights of each layer, bit for bit those of the format's own formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmc.errors import LlmcError, ModelError, UnsupportedError
from llmc.importer.huggingface.quantized import quantized_sources
from llmc.importer.huggingface.quantized.packing import ones, unpack
from llmc.importer.huggingface.safetensors_file import read_header
from llmc.importer.params import Source
from llmc.passes.quantize.native import column_order, native, native_scheme
from tests.support import quantized_checkpoints as made

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3"}

# name -> packer, quantization_config, the scheme it is stored by, [o, k]
CASES: dict[str, tuple[made.Packer, dict[str, Any], str, tuple[int, int]]] = {
    "gptq": (made.gptq(), GPTQ, "int4_g32", (40, 96)),
    "gptq_zero_points": (made.gptq(symmetric=False), GPTQ, "int4p_g32", (40, 96)),
    "gptq_v2": (made.gptq(symmetric=False, v1=False), {**GPTQ, "checkpoint_format": "gptq_v2"}, "int4p_g32", (24, 64)),
    "gptq_act_order": (made.gptq(symmetric=False, act_order=True), {**GPTQ, "desc_act": True}, "int4p_g32", (16, 128)),
    "gptq_8": (made.gptq(8, 64, symmetric=False), {**GPTQ, "bits": 8, "group_size": 64}, "int8p_g64", (12, 128)),
    "gptq_3": (made.gptq(3, 32, symmetric=False), {**GPTQ, "bits": 3}, "int3p_g32", (32, 96)),
    "gptq_2_rows": (made.gptq(2, -1), {**GPTQ, "bits": 2, "group_size": -1}, "int2_row", (16, 80)),
    "gptq_own_bits": (made.gptq(8, 32), {**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "int8_g32", (16, 64)),
    "gptq_bfloat16": (made.gptq(dtype=torch.bfloat16), GPTQ, "int4_g32_bf16", (16, 64)),
    "gptq_512": (made.gptq(4, 512), {**GPTQ, "group_size": 512}, "int4_g512", (8, 1024)),
    "gptq_last_group_short": (made.gptq(4, 64), {**GPTQ, "group_size": 64}, "int4_g64", (8, 96)),
    "auto_round": (
        made.gptq(),
        {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        "int4_g32",
        (8, 64),
    ),
    "awq": (made.awq(), AWQ, "int4p_g32", (40, 96)),
    "pack_quantized": (made.pack_quantized(), made.compressed_config("pack-quantized"), "int4_g32_bf16", (13, 96)),
    "pack_quantized_zero_points": (
        made.pack_quantized(symmetric=False),
        made.compressed_config("pack-quantized"),
        "int4p_g32_bf16",
        (13, 96),
    ),
    "pack_quantized_act_order": (
        made.pack_quantized(act_order=True),
        made.compressed_config("pack-quantized"),
        "int4_g32_bf16",
        (10, 128),
    ),
    "pack_quantized_8_rows": (made.pack_quantized(8, -1), made.compressed_config("pack-quantized", 8), "int8_bf16", (9, 70)),
    "pack_quantized_3": (made.pack_quantized(3, 32), made.compressed_config("pack-quantized", 3), "int3_g32_bf16", (9, 64)),
    "int_quantized": (made.int_quantized(), made.compressed_config("int-quantized", 8), "int8_bf16", (11, 50)),
    "int_quantized_zero_points": (
        made.int_quantized(symmetric=False),
        made.compressed_config("int-quantized", 8),
        "int8p_bf16",
        (11, 50),
    ),
    "float_quantized": (made.fp8("channel"), made.compressed_config("float-quantized", 8, "float"), "fp8_e4m3", (11, 50)),
    "mxfp4": (made.mxfp4(), made.compressed_config("mxfp4-pack-quantized", 4, "float"), "mxfp4", (11, 96)),
    "fp8_blocks": (
        made.fp8("block", "weight_scale_inv"),
        {**FP8, "weight_block_size": [128, 128]},
        "fp8_e4m3_b128",
        (200, 150),
    ),
    "fp8_one_block": (
        made.fp8("block", "weight_scale_inv"),
        {**FP8, "weight_block_size": [128, 128]},
        "fp8_e4m3_b128",
        (100, 128),
    ),
    "fp8_tensor": (made.fp8("tensor"), FP8, "fp8_e4m3_t", (11, 50)),
    "fbgemm": (made.fp8("channel"), {"quant_method": "fbgemm_fp8"}, "fp8_e4m3", (11, 50)),
    "modelopt": (made.fp8("tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_e4m3_t", (11, 50)),
    "nf4": (made.nf4(), BNB, "nf4_g64_f32", (11, 128)),
    "nf4_plain_scales": (made.nf4(nested=False), BNB, "nf4_g64_f32", (11, 128)),
    "llm_int8": (made.llm_int8(), {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8_f32", (11, 50)),
}
ODD: dict[str, tuple[made.Packer, dict[str, Any], str, tuple[int, int]]] = {"gptq_48": (made.gptq(4, 48), GPTQ, "", (8, 96))}
"""Layers that are refused whatever the configuration says."""


def sources(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Source]:
    save_file(tensors, folder / "model.safetensors")
    return quantized_sources(config, read_header(folder / "model.safetensors"), "config.json")


def layer(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any], str]:
    pack, config, scheme, (o, k) = {**CASES, **ODD}[name]
    parts, weight = pack(o, k, np.random.default_rng(7))
    return {f"model.mlp.{part}": value for part, value in parts.items()}, weight, config, scheme


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_format(name: str, tmp_path: Path) -> None:
    parts, weight, config, scheme = layer(name)
    bias = torch.arange(3.0)
    found = sources(tmp_path, {**parts, "model.mlp.bias": bias, "model.norm.weight": bias.clone()}, config)
    assert set(found) == {"model.mlp.weight", "model.mlp.bias", "model.norm.weight"}
    source = found["model.mlp.weight"]
    assert source.shape == tuple(weight.shape)
    assert native_scheme(source) == scheme
    np.testing.assert_array_equal(source.read(), weight.numpy())
    order = column_order(source)
    stored = weight.numpy() if order is None else weight.numpy()[:, order]
    assert (order is not None) == ("act_order" in name)
    np.testing.assert_array_equal(native(source).dequantize(), stored)


def test_fields_that_cross_words() -> None:
    rng = np.random.default_rng(3)
    for bits in range(2, 9):
        fields = rng.integers(0, 1 << bits, (3, 70))
        words = made._pack(fields, bits).numpy()
        np.testing.assert_array_equal(unpack(words, bits, 70), fields)
        length = len(ones(bits)) * 32 // bits
        np.testing.assert_array_equal(unpack(ones(bits).view(np.int32)[None], bits, length), np.ones((1, length)))


def _without(part: str) -> Any:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(part)}


def _uneven(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.mlp.g_idx": torch.zeros_like(tensors["model.mlp.g_idx"])}


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
REFUSED: dict[str, tuple[str, dict[str, Any], Any, type[LlmcError], str]] = {
    "method": (
        "gptq",
        {"quant_method": "aqlm"},
        None,
        UnsupportedError,
        r"config.json says .* quantized by aqlm, .* one of gptq, awq",
    ),
    "gptq_marlin": (
        "gptq",
        {**GPTQ, "checkpoint_format": "marlin"},
        None,
        UnsupportedError,
        r"mlp.qweight is quantized by gptq to 4 bits in the format 'marlin'",
    ),
    "gptq_scales": (
        "gptq",
        GPTQ,
        _without("scales"),
        ModelError,
        r"model.mlp quantized by gptq without its tensor model.mlp.scales",
    ),
    "gptq_groups": ("gptq_act_order", GPTQ, _uneven, UnsupportedError, r"mlp.g_idx is quantized by gptq to 4 bits with groups"),
    "odd_groups": ("gptq_48", {**GPTQ, "group_size": 48}, None, UnsupportedError, r"mlp.qweight .* 4 bits in groups of 48 columns"),
    "awq_gemv": ("awq", {**AWQ, "version": "gemv"}, None, UnsupportedError, r"mlp.qweight is quantized by awq to 4 bits in .*gemv"),
    "nvfp4": ("fp8_tensor", NVFP4, None, UnsupportedError, r"model.mlp.weight is quantized by modelopt with the algorithm NVFP4"),
    "no_scale": ("fp8_tensor", FP8, _without("weight_scale"), UnsupportedError, r"mlp.weight .* fp8 to 8 bits without a scale"),
    "rotated": (
        "pack_quantized",
        {**made.compressed_config("pack-quantized"), "transform_config": {"config_groups": {"u": {}}}},
        None,
        UnsupportedError,
        r"mlp.weight is quantized by compressed-tensors to 4 bits with rotations",
    ),
    "unknown_bits": (
        "pack_quantized",
        {"quant_method": "compressed-tensors", "config_groups": {}},
        None,
        UnsupportedError,
        r"mlp.weight_packed is quantized by compressed-tensors to unknown bits",
    ),
    "fp4": (
        "nf4",
        BNB,
        lambda tensors: {n.replace("__nf4", "__fp4"): t for n, t in tensors.items()},
        UnsupportedError,
        r"mlp.weight is quantized by bitsandbytes to 4 bits of the type fp4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    case, config, change, kind, message = REFUSED[name]
    parts, *_ = layer(case)
    with pytest.raises(kind, match=message):
        sources(tmp_path, parts if change is None else change(parts), config)


def test_broken_scales_are_found(tmp_path: Path) -> None:
    parts, _, config, _ = layer("gptq")
    parts["model.mlp.scales"][0, 1] = float("nan")
    with pytest.raises(ModelError, match=r"scales of model.safetensors:model.mlp.qweight holds 1 NaN"):
        native(sources(tmp_path, parts, config)["model.mlp.weight"])


def test_broken_codes_are_found(tmp_path: Path) -> None:
    parts, _, config, _ = layer("fp8_tensor")
    parts["model.mlp.weight"].view(torch.uint8)[2, 3] = 0xFF
    with pytest.raises(ModelError, match=r"model.mlp.weight holds a NaN"):
        native(sources(tmp_path, parts, config)["model.mlp.weight"])
