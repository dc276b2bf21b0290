"""Quantized matrices row by row, with scales and offsets beside the codes. For every scheme.

What panels do not take (FP8, FP4, tables of values) is stored so on a CPU. A code takes a byte, or half of one if it has at most 4
bits: byte 16 b + j of a row then holds columns 32 b + j, in its low half, and 32 b + 16 + j.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llmc.passes.quantize.scheme import QuantizedTensor, Scheme
from llmc.schedules.protocol import TensorSpec

NAME = "cpu.plain"
ACTIVATIONS: tuple[str, ...] = ()
BLOCK = 32
"""Columns whose halves share bytes."""


def takes(scheme: Scheme, o: int, k: int, target: Any) -> str | None:
    if target.kind != "cpu":
        return f"{NAME} is a layout for CPUs, not for {target.name}"
    return f"{NAME} has one level of scales, {scheme.name} has two" if scheme.super_group else None


def halved(scheme: Scheme) -> bool:
    """Whether two codes share a byte."""
    return scheme.bits <= 4


def parts(scheme: Scheme, o: int, k: int) -> dict[str, TensorSpec]:
    """``codes`` uint8 [o, k], or [o, k / 2] with k rounded up to 32; ``scales`` [o, groups]; ``zeros`` uint8 or ``minima``
    [o, groups]; ``table`` float32 [2^bits], the values of the codes of a table."""
    groups = (o, scheme.groups(k))
    columns = -(-k // BLOCK) * BLOCK // 2 if halved(scheme) else k
    found = {"codes": TensorSpec((o, columns), "uint8"), "scales": TensorSpec(groups, scheme.scale_dtype)}
    if scheme.offset == "zero_point":
        found["zeros"] = TensorSpec(groups, "uint8")
    if scheme.offset == "minimum":
        found["minima"] = TensorSpec(groups, scheme.scale_dtype)
    if scheme.kind == "table":
        found["table"] = TensorSpec((1 << scheme.bits,), "float32")
    return found


def pack(q: QuantizedTensor) -> dict[str, np.ndarray]:
    """The arrays of :func:`parts`."""
    dtype = q.scheme.scale_dtype
    found = {"codes": _packed(q.codes) if halved(q.scheme) else q.codes, "scales": _typed(q.scales, dtype)}
    if q.zeros is not None:
        found["zeros"] = q.zeros
    if q.minima is not None:
        found["minima"] = _typed(q.minima, dtype)
    if q.scheme.kind == "table":
        found["table"] = q.scheme.values()
    return found


def unpack(parts: dict[str, np.ndarray], scheme: Scheme, o: int, k: int) -> QuantizedTensor:
    """The inverse of :func:`pack`."""
    minima = parts.get("minima")
    codes = _unpacked(parts["codes"], k) if halved(scheme) else parts["codes"]
    return QuantizedTensor(scheme, codes, _bits(parts["scales"]), parts.get("zeros"), None if minima is None else _bits(minima))


def _packed(codes: np.ndarray) -> np.ndarray:
    o, k = codes.shape
    blocks = np.pad(codes, ((0, 0), (0, -k % BLOCK))).reshape(o, -1, 2, BLOCK // 2)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(o, -1)


def _unpacked(packed: np.ndarray, k: int) -> np.ndarray:
    halves = packed.reshape(len(packed), -1, BLOCK // 2)
    return np.ascontiguousarray(np.stack([halves & 15, halves >> 4], axis=2).reshape(len(packed), -1)[:, :k])


def _typed(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else values


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values
