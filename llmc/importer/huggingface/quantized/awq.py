"""AWQ checkpoints (Lin et al., arXiv:2306.00978) in the "gemm" packing of AutoAWQ, 4 bits.

A layer [o, k] has ``qweight`` int32 [k, o / 8], ``qzeros`` int32 [groups, o / 8] and ``scales`` [groups, o]; a word holds eight
neighbouring output channels, in nibbles from the low end up: channels 0, 2, 4, 6, 1, 3, 5, 7. w = scale · (code - zero).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized.modules import Modules, QuantizedWeight, integer_scheme, scale_bits
from llmc.importer.huggingface.quantized.packing import unpack
from llmc.passes.quantize.scheme import QuantizedTensor, scheme

BITS = 4
CHANNELS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output channel of each nibble of a word."""


def read(modules: Modules, config: dict[str, Any]) -> None:
    """Replace every layer that has a ``qweight``."""
    form = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    bits = int(config.get("bits", config.get("w_bit", BITS)))
    for module in modules.having("qweight"):
        if form != "gemm" or bits != BITS:
            raise modules.refusal(f"{module}.qweight", f"to {bits} bits in the packing {form!r}")
        modules.add(f"{module}.weight", _weight(modules, module))


def _weight(modules: Modules, module: str) -> QuantizedWeight:
    codes, zeros, scales = (modules.take(module, part) for part in ("qweight", "qzeros", "scales"))
    k, words = codes.shape
    groups, o = scales.shape
    modules.expect(codes, (k, o // 8), f"a layer of {o} output channels")
    modules.expect(zeros, (groups, words), f"a layer of {o} output channels with {groups} groups")
    if k % groups:
        raise modules.refusal(codes.describe(), f"to {BITS} bits with {groups} groups for {k} columns")
    symmetric = bool((_channels(zeros) == 1 << (BITS - 1)).all())
    name = integer_scheme(modules, codes, BITS, k // groups, symmetric, scales, k)
    return QuantizedWeight(codes.describe(), (o, k), name, partial(_load, codes, None if symmetric else zeros, scales, name))


def _channels(words: FileTensor) -> np.ndarray:
    """int32 [n, o / 8] -> uint8 [n, o], channels in order."""
    n, count = words.shape
    nibbles = unpack(words.read(), BITS, 8 * count).reshape(n, count, 8)
    return nibbles[:, :, np.argsort(CHANNELS)].reshape(n, 8 * count)


def _load(codes: FileTensor, zeros: FileTensor | None, scales: FileTensor, name: str) -> QuantizedTensor:
    points = None if zeros is None else np.ascontiguousarray(_channels(zeros).T)
    turned = np.ascontiguousarray(_channels(codes).T)
    return QuantizedTensor(scheme(name), turned, np.ascontiguousarray(scale_bits(scales.read()).T), points)
