"""compressed-tensors checkpoints (llm-compressor): every format whose codes are integers, FP8 or MXFP4.

====================== ===========================================================================================================
pack-quantized         ``weight_packed`` int32 [o, k · bits / 32]: code + 2^(bits-1), fields from the low bits up; ``weight_shape``;
                       ``weight_zero_point`` int32 [o · bits / 32, groups], packed alike along o; also ``weight_g_idx`` [k]
int-quantized          ``weight`` int8 [o, k]; ``weight_zero_point`` int8
float-quantized        ``weight`` FP8
mxfp4-pack-quantized   ``weight_packed`` uint8 [o, k / 2], ``weight_scale`` uint8 [o, k / 32], exponents less 127
====================== ===========================================================================================================

``weight_scale`` is [o, groups], [o, 1] or [1]. Which layers are quantized and how is read off their tensors, so the ignore list and
mixed precisions need no rule; only the bits of packed words come from ``config_groups``. Activations stay as they are.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np

from llmc.errors import ModelError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized import fp8, mxfp4
from llmc.importer.huggingface.quantized.modules import Modules, QuantizedWeight, column_order, integer_scheme, scale_bits
from llmc.importer.huggingface.quantized.packing import unpack, word_count
from llmc.passes.quantize.scheme import QuantizedTensor, scheme

BITS = range(2, 9)


def read(modules: Modules, config: dict[str, Any]) -> None:
    """Replace every layer that has a ``weight_scale``."""
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    rotated = bool((config.get("transform_config") or {}).get("config_groups"))
    for module in modules.having("weight_scale"):
        if sparsity != "dense" or rotated:
            how = "with rotations of its activations" if rotated else f"and stored sparse as {sparsity!r}"
            raise modules.refusal(f"{module}.weight", f"to {_bits(config, module) or 'unknown'} bits {how}")
        modules.add(f"{module}.weight", _weight(modules, module, config))


def _weight(modules: Modules, module: str, config: dict[str, Any]) -> QuantizedWeight:
    packed = modules.tensors.get(f"{module}.weight_packed")
    if packed is None:
        plain = modules.tensors.get(f"{module}.weight")
        if plain is not None and plain.dtype == "int8":
            return _int8(modules, module)
        return fp8.weight(modules, module, "weight_scale")
    if packed.dtype == "uint8" and f"{module}.weight_global_scale" not in modules.tensors:
        return mxfp4.linear(modules, module)
    if packed.dtype != "int32":
        raise modules.refusal(packed.describe(), "to 4-bit floats with two levels of scales")
    return _packed(modules, module, config)


def _bits(config: dict[str, Any], module: str) -> int:
    """The bits of ``module``'s weights, 0 if no group says: its name, a regular expression, then a kind of layer."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict) and g.get("weights")]

    def rank(target: str) -> int:
        if target == module:
            return 0
        if target.startswith("re:"):
            return 1 if re.match(target[3:], module) else 3
        return 2 if "." not in target else 3

    ranked = [(min((rank(str(t)) for t in g.get("targets", ())), default=3), int(g["weights"].get("num_bits", 0))) for g in groups]
    best = min(ranked, default=(3, 0))
    return 0 if best[0] == 3 else next(bits for found, bits in ranked if found == best[0])


def _scales(modules: Modules, scales: FileTensor, o: int, k: int, bits: int) -> int:
    """Columns of a group, 0 for a whole row."""
    if scales.shape in ((), (1,), (1, 1), (o,), (o, 1)):
        return 0
    groups = scales.shape[-1]
    if scales.shape != (o, groups) or k % groups:
        raise modules.refusal(scales.describe(), f"to {bits} bits with scales {list(scales.shape)} for a matrix {[o, k]}")
    return k // groups


def _packed(modules: Modules, module: str, config: dict[str, Any]) -> QuantizedWeight:
    packed, shape, scales = (modules.take(module, part) for part in ("weight_packed", "weight_shape", "weight_scale"))
    zeros, index = modules.take_if(module, "weight_zero_point"), modules.take_if(module, "weight_g_idx")
    o, k = _shape(shape)
    bits = _bits(config, module)
    if bits not in BITS or packed.shape != (o, word_count(k, bits)):
        raise modules.refusal(packed.describe(), f"to {bits or 'unknown'} bits as words {list(packed.shape)} for a matrix {[o, k]}")
    group = _scales(modules, scales, o, k, bits)
    order = column_order(modules, index, bits, group or k)
    if zeros is not None:
        modules.expect(zeros, (word_count(o, bits), k // group if group else 1), f"a matrix {[o, k]} of {bits} bits")
    name = integer_scheme(modules, packed, bits, group, zeros is None, scales, k)
    load = partial(_load_packed, packed, scales, zeros, name, (o, k), order)
    return QuantizedWeight(packed.describe(), (o, k), name, load, order)


def _shape(stored: FileTensor) -> tuple[int, int]:
    """What ``weight_shape`` says."""
    if stored.shape != (2,):
        raise ModelError(f"{stored.describe()} is {list(stored.shape)} and must hold two sizes: download the checkpoint again")
    o, k = (int(d) for d in stored.read())
    return o, k


def _rows(scales: np.ndarray, o: int) -> np.ndarray:
    """Scales or zero points as [o, groups]."""
    return np.ascontiguousarray(scales if scales.ndim == 2 and len(scales) == o else np.broadcast_to(scales.reshape(-1, 1), (o, 1)))


def _load_packed(
    packed: FileTensor,
    scales: FileTensor,
    zeros: FileTensor | None,
    name: str,
    shape: tuple[int, int],
    order: np.ndarray | None,
) -> QuantizedTensor:
    how, (o, k) = scheme(name), shape
    codes = unpack(packed.read(), how.bits, k)
    if order is not None:
        codes = np.ascontiguousarray(codes[:, order])
    points = None
    if zeros is not None:
        points = np.ascontiguousarray(unpack(zeros.read().T, how.bits, o).T)
    return QuantizedTensor(how, codes, scale_bits(_rows(scales.read(), o)), points)


def _int8(modules: Modules, module: str) -> QuantizedWeight:
    codes, scales = modules.take(module, "weight"), modules.take(module, "weight_scale")
    zeros = modules.take_if(module, "weight_zero_point")
    o, k = codes.shape
    group = _scales(modules, scales, o, k, 8)
    name = integer_scheme(modules, codes, 8, group, zeros is None, scales, k)
    return QuantizedWeight(codes.describe(), (o, k), name, partial(_load_int8, codes, scales, zeros, name))


def _load_int8(codes: FileTensor, scales: FileTensor, zeros: FileTensor | None, name: str) -> QuantizedTensor:
    o = codes.shape[0]
    points = None if zeros is None else _rows(zeros.read(), o).view(np.uint8) ^ 0x80
    return QuantizedTensor(scheme(name), codes.read().view(np.uint8) ^ 0x80, scale_bits(_rows(scales.read(), o)), points)
