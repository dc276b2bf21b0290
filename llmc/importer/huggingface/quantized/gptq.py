"""GPTQ checkpoints (Frantar et al., arXiv:2210.17323), as AutoGPTQ and GPTQModel write them.

A layer [o, k] has four tensors, fields packed from the low bits of a word up and across words:

========== ============================== ============================================================================
``qweight`` int32 [k · bits / 32, o]      codes, packed along k
``qzeros``  int32 [groups, o · bits / 32] zero points, packed along o
``scales``  [groups, o]
``g_idx``   int32 [k]                     the group of every column; in order, or scattered by act-order
========== ============================== ============================================================================

w = scale · (code - zero). Format v1 stores the zero points less one; its reader adds one to every field by adding words, so that
a field that went below zero borrowed from its neighbour and pays it back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized.modules import Modules, QuantizedWeight, column_order, integer_scheme, scale_bits
from llmc.importer.huggingface.quantized.packing import ones, unpack, word_count
from llmc.passes.quantize.scheme import QuantizedTensor, scheme

BITS = (2, 3, 4, 8)


def read(modules: Modules, config: dict[str, Any]) -> None:
    """Replace every layer that has a ``qweight``."""
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    for module in modules.having("qweight"):
        if form not in ("gptq", "gptq_v2"):
            raise modules.refusal(f"{module}.qweight", f"to {config.get('bits', '?')} bits in the format {form!r}")
        modules.add(f"{module}.weight", _weight(modules, module, config, form == "gptq"))


def _weight(modules: Modules, module: str, config: dict[str, Any], v1: bool) -> QuantizedWeight:
    codes, zeros, scales = (modules.take(module, part) for part in ("qweight", "qzeros", "scales"))
    index = modules.take_if(module, "g_idx")
    bits = int(config.get("bits", 4))
    if index is not None and index.shape[0]:  # a layer may have bits of its own: the lengths tell
        bits = 32 * codes.shape[0] // index.shape[0]
    if bits not in BITS:
        raise modules.refusal(codes.describe(), f"to {bits} bits")
    k = index.shape[0] if index is not None else 32 * codes.shape[0] // bits
    groups, o = scales.shape
    modules.expect(codes, (word_count(k, bits), o), f"a layer of {o} × {k} at {bits} bits")
    modules.expect(zeros, (groups, word_count(o, bits)), f"a layer of {o} × {k} with {groups} groups")
    group = _group(modules, codes, config, bits, k, groups)
    order = column_order(modules, index, bits, group or k)
    points = _zero_points(zeros, bits, o, v1)
    symmetric = bool((points == 1 << (bits - 1)).all())
    name = integer_scheme(modules, codes, bits, group, symmetric, scales, k)
    load = partial(_load, codes, scales, None if symmetric else (zeros, v1), name, order)
    return QuantizedWeight(codes.describe(), (o, k), name, load, order)


def _group(modules: Modules, codes: FileTensor, config: dict[str, Any], bits: int, k: int, groups: int) -> int:
    """Columns of a group, 0 for all. A layer may have groups of its own size, which its scales tell."""
    if groups == 1:
        return 0
    asked = int(config.get("group_size", 0))
    if asked > 0 and -(-k // asked) == groups:
        return asked
    if k % groups:
        raise modules.refusal(codes.describe(), f"to {bits} bits with {groups} groups for {k} columns")
    return k // groups


def _zero_points(zeros: FileTensor, bits: int, o: int, v1: bool) -> np.ndarray:
    """uint8 [groups, o]."""
    words = np.ascontiguousarray(zeros.read()).view(np.uint32)
    if v1:
        words = words + np.resize(ones(bits), words.shape[1])
    return unpack(words.view(np.int32), bits, o)


def _load(
    codes: FileTensor, scales: FileTensor, zeros: tuple[FileTensor, bool] | None, name: str, order: np.ndarray | None
) -> QuantizedTensor:
    how = scheme(name)
    words = codes.read().T
    k = 32 * words.shape[1] // how.bits if order is None else len(order)
    unpacked = unpack(words, how.bits, k)
    if order is not None:
        unpacked = np.ascontiguousarray(unpacked[:, order])
    points = None if zeros is None else _zero_points(zeros[0], how.bits, len(words), zeros[1])
    return QuantizedTensor(
        how, unpacked, np.ascontiguousarray(scale_bits(scales.read()).T), None if points is None else np.ascontiguousarray(points.T)
    )
