"""MXFP4 checkpoints: E2M1 codes with a power of two for 32 of them (OCP Microscaling Formats 1.0).

Experts, as gpt-oss has them: ``gate_up_proj_blocks`` uint8 [E, o, k / 32, 16], ``gate_up_proj_scales`` uint8 [E, o, k / 32], for a
parameter that the model holds as [E, k, o]. Layers of compressed-tensors: ``weight_packed`` uint8 [o, k / 2], ``weight_scale``
uint8 [o, k / 32]. A byte holds two codes, the first in its low half; a scale byte s is 2^(s - 127).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from llmc.errors import ModelError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized.modules import Modules, QuantizedWeight
from llmc.importer.params import Swapped
from llmc.passes.quantize.scheme import QuantizedTensor, scheme

NAME = "mxfp4"
GROUP = 32


def read(modules: Modules, config: dict[str, Any]) -> None:
    """Replace every ``*_blocks`` with its ``*_scales``."""
    for name in [n.removesuffix("_blocks") for n in modules.tensors if n.endswith("_blocks")]:
        codes, scales = modules.tensors.pop(f"{name}_blocks"), modules.tensors.pop(f"{name}_scales", None)
        if scales is None:
            raise ModelError(f"the checkpoint holds {name}_blocks without {name}_scales: download it again")
        if codes.dtype != "uint8" or len(codes.shape) != 4 or codes.shape[3] != GROUP // 2:
            raise modules.refusal(codes.describe(), f"to 4 bits as {codes.dtype} {list(codes.shape)}")
        e, o, groups, _ = codes.shape
        modules.expect(scales, (e, o, groups), f"blocks of {list(codes.shape)}")
        load = partial(_load, codes, scales, (e * o, groups * GROUP))
        modules.add(name, Swapped(QuantizedWeight(codes.describe(), (e, o, groups * GROUP), NAME, load)))


def linear(modules: Modules, module: str) -> QuantizedWeight:
    """The source for one layer of compressed-tensors."""
    codes, scales = modules.take(module, "weight_packed"), modules.take(module, "weight_scale")
    o, k = codes.shape[0], 2 * codes.shape[1]
    modules.expect(scales, (o, k // GROUP), f"a matrix {[o, k]}")
    return QuantizedWeight(codes.describe(), (o, k), NAME, partial(_load, codes, scales, (o, k)))


def _load(codes: FileTensor, scales: FileTensor, shape: tuple[int, int]) -> QuantizedTensor:
    stored = codes.read().reshape(shape[0], -1)
    unpacked = np.stack([stored & 15, stored >> 4], axis=2).reshape(shape)
    exponents = scales.read().reshape(shape[0], -1).astype(np.uint16)
    if (exponents == 255).any():
        raise ModelError(f"{scales.describe()} holds a NaN: the checkpoint is broken, download or convert it again")
    # bfloat16's exponent is biased by 127 too; 2^-127 is subnormal there, half of its smallest normal number
    return QuantizedTensor(scheme(NAME), unpacked, np.where(exponents == 0, np.uint16(0x40), exponents << 7).astype(np.uint16))
