"""A tiny quantized model, every kernel of both phases through the emulator, against transformers on the dequantized weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmc import targets
from llmc.passes.quantize.options import QuantOptions
from llmc.passes.quantize.plan import OUTER_SCHEME
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import scheme
from llmc.reference import reference_model
from tests.kernels_cuda import test_whole_model as whole
from tests.support.stepper import Stepper

SCHEME = "int4z_g32"
ROUTER = "block_sparse_moe.gate."
"""Part of the name of a matrix that picks experts, which stays as it is."""


def dequantized(folder: Path, to: Path) -> Path:
    """A copy of a model whose matrices have the values that their rounding to :data:`SCHEME` (outer ones: int8) stands for."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim >= 2 and ROUTER not in name:
            outer = "embed_tokens" in name or "lm_head" in name
            rows = weight.reshape(-1, weight.shape[-1])
            weights[name] = quantize(rows, scheme(OUTER_SCHEME if outer else SCHEME)).dequantize().reshape(weight.shape)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "target"), [("llama", "cuda:sm_80"), ("llama", "cuda:sm_90a"), ("mixtral", "rocm:gfx942")])
def test_prefill_and_decode(
    model_type: str, target: str, tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the tensor core kernels take, a gate that is fused, and an embedding that is looked up in its packed form."""
    monkeypatch.setattr(whole, "TARGET", targets.parse(target))
    monkeypatch.setattr(whole, "OPTIONS", replace(whole.OPTIONS, quantization=QuantOptions(quant=SCHEME)))
    folder = tiny_model_dir(
        model_type, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    machine, reference = whole.Machine(folder), reference_model(str(dequantized(folder, tmp_path / "dequantized")))
    names = {var.name_hint for var in machine.kernels}
    assert any("quantized_take" in n for n in names)
    kernel = "quantized_linear_int4z" if target.endswith("90a") else "quantized_gemv_int4z"
    for name in (kernel, *(["quantized_moe"] if model_type == "mixtral" else [])):
        assert any(n.startswith(name) for n in names), names
    sequences = [np.random.default_rng(5).integers(0, 200, n) for n in (7, 4)]
    stepper = Stepper(machine, sequences, whole.OPTIONS.page_size, whole.PAGES)
    stepper.extend([(0, 5), (1, 3)])
    stepper.decode([1, 0])
    stepper.extend([(0, 1)])
    for ids, found in zip(sequences, stepper.logits, strict=True):
        expected = reference.logits([int(i) for i in ids])
        for position, row in found.items():
            assert np.abs(row - expected[position]).max() < 3e-2 * np.abs(expected).max(), position
