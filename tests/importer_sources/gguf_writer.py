"""Small GGUF files for tests, written by the gguf package from a transformers model: names through its map, values as given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch


def write_gguf(
    path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, np.ndarray], block: str | None = None
) -> Path:
    """Write ``tensors`` (outermost dimension first); matrices whose rows fit are stored in the block type ``block``."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[block] if block else None
        if kind is not None and values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: torch.nn.Module, architecture: str, layers: int, extra: dict[str, str]) -> dict[str, np.ndarray]:
    """``model``'s weights under llama.cpp's names; ``extra`` names those that its map does not (model name -> GGUF name)."""
    key = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(key, layers)
    out: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        stem, dot, suffix = name.rpartition(".")
        # llama.cpp's converter met some models without their head, so without the first part of the name
        known = names.get_name(stem) or names.get_name(stem.partition(".")[2]) or ""
        mapped = extra.get(name) or known + dot + suffix
        if not mapped.startswith("."):
            out[mapped] = tensor.float().numpy()
    return out
