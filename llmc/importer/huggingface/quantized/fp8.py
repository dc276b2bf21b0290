"""FP8 (E4M3) checkpoints: ``weight`` [o, k] with a scale for the matrix, for every output channel, or for blocks of 128 × 128.

DeepSeek-style ones keep ``weight_scale_inv`` [o / 128, k / 128] (what a code is multiplied by, whatever the name says); FBGEMM,
ModelOpt and compressed-tensors keep ``weight_scale`` of shape [], [1] or [o, 1]. Scales become float32, which holds any of them.
Scales of activations and of the KV cache stay in the file: activations are not rounded by them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from llmc.errors import ModelError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized.modules import Modules, QuantizedWeight
from llmc.passes.quantize.scheme import QuantizedTensor, scheme

BLOCK = 128
INVERSE = "weight_scale_inv"
NAN = 0x7F  # and 0xFF: the only codes of E4M3 (fn) that are no number


def read(modules: Modules, config: dict[str, Any]) -> None:
    """Replace every layer that has a ``weight_scale_inv`` or a ``weight_scale``."""
    for part in (INVERSE, "weight_scale"):
        for module in modules.having(part):
            modules.add(f"{module}.weight", weight(modules, module, part))


def read_modelopt(modules: Modules, config: dict[str, Any]) -> None:
    """As :func:`read`, for what ModelOpt says of its checkpoints: the algorithm must be FP8."""
    settings = config.get("quantization") if isinstance(config.get("quantization"), dict) else config
    algorithm = str((settings or {}).get("quant_algo", "an unnamed algorithm"))
    if algorithm != "FP8":
        first = next(modules.having("weight_scale"), "the model")
        raise modules.refusal(f"{first}.weight", f"with the algorithm {algorithm}")
    read(modules, config)


def weight(modules: Modules, module: str, scale_part: str) -> QuantizedWeight:
    """The source for one layer."""
    codes, scales = modules.take(module, "weight"), modules.take(module, scale_part)
    if codes.dtype != "float8_e4m3fn" or len(codes.shape) != 2:
        raise modules.refusal(codes.describe(), f"as {codes.dtype} {list(codes.shape)} with a {scale_part}")
    o, k = codes.shape
    blocks = (-(-o // BLOCK), -(-k // BLOCK))
    if scales.shape == blocks and (scale_part == INVERSE or max(blocks) > 1):
        # also a matrix of one block: it is stored as its neighbours are, with which it may be merged
        name = "fp8_e4m3_b128"
    elif scales.shape in ((), (1,), (1, 1)):
        name = "fp8_e4m3_t"
    elif scales.shape in ((o,), (o, 1)):
        name = "fp8_e4m3"
    else:
        raise modules.refusal(codes.describe(), f"to 8 bits with scales {list(scales.shape)} for a matrix {list(codes.shape)}")
    return QuantizedWeight(codes.describe(), (o, k), name, partial(_load, codes, scales, name))


def _load(codes: FileTensor, scales: FileTensor, name: str) -> QuantizedTensor:
    how, (o, _) = scheme(name), codes.shape
    stored = codes.read().view(np.uint8)
    if (stored & NAN == NAN).any():
        raise ModelError(f"{codes.describe()} holds a NaN: the checkpoint is broken, download or convert it again")
    values = scales.read().astype(np.float32)
    rows = np.repeat(values, BLOCK, axis=0)[:o] if how.rows == BLOCK else np.broadcast_to(values.reshape(-1, 1), (o, 1))
    return QuantizedTensor(how, stored, np.ascontiguousarray(rows))
