"""compressed-tensors itself as the judge: what it compresses is read back to what it decompresses.

Needs ``pip install --no-deps compressed-tensors loguru``; nothing else of llmc does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmc.importer.huggingface.quantized import quantized_sources
from llmc.importer.huggingface.safetensors_file import read_header
from tests.support.quantized_checkpoints import compressed_config

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    ("form", "bits", "kind", "strategy", "symmetric"),
    [
        ("pack-quantized", 4, "int", "group", True),
        ("pack-quantized", 4, "int", "group", False),
        ("pack-quantized", 3, "int", "group", True),
        ("pack-quantized", 8, "int", "channel", True),
        ("int-quantized", 8, "int", "channel", True),
        ("float-quantized", 8, "float", "channel", True),
        ("float-quantized", 8, "float", "tensor", True),
    ],
)
def test_read_back(form: str, bits: int, kind: str, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    group = 32 if strategy == "group" else None
    arguments = quantization.QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, group_size=group)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = library.compressors.BaseCompressor.load_from_registry(form)
    torch.manual_seed(bits)
    weight = torch.randn(48, 96)
    shape = {"group": (48, 3), "channel": (48, 1), "tensor": (1,)}[strategy]
    largest = 448.0 if kind == "float" else float(1 << (bits - 1))
    state = {"weight": weight, "weight_scale": (torch.rand(shape) + 2.5) / largest}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-3, 4, shape).to(torch.int8)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"].float()
    tensors = {f"layer.{name}": value.contiguous() for name, value in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = compressed_config(form, bits, kind)
    found = quantized_sources(config, read_header(tmp_path / "model.safetensors"), "config.json")["layer.weight"]
    np.testing.assert_array_equal(found.read(), expected.numpy())
