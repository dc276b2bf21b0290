"""Quantized matrices as they are: a byte per code, row-major, with scales and offsets beside it. For every scheme.

What no packed layout takes (FP8, FP4, tables of values) is stored so on a CPU: a weight costs eight bits whatever its scheme.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llmc.passes.quantize.scheme import QuantizedTensor, Scheme
from llmc.schedules.protocol import TensorSpec

NAME = "cpu.plain"


def takes(scheme: Scheme, o: int, k: int, target: Any) -> str | None:
    if target.kind != "cpu":
        return f"{NAME} is a layout for CPUs, not for {target.name}"
    return f"{NAME} has one level of scales, {scheme.name} has two" if scheme.super_group else None


def parts(scheme: Scheme, o: int, k: int) -> dict[str, TensorSpec]:
    """``codes`` uint8 [o, k], ``scales`` [o, groups]; ``zeros`` uint8 or ``minima`` [o, groups]; ``table`` float32 [2^bits], the
    values of the codes of a table."""
    groups = (o, scheme.groups(k))
    found = {"codes": TensorSpec((o, k), "uint8"), "scales": TensorSpec(groups, scheme.scale_dtype)}
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
    found = {"codes": q.codes, "scales": _typed(q.scales, dtype)}
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
    return QuantizedTensor(
        scheme, parts["codes"], _bits(parts["scales"]), parts.get("zeros"), None if minima is None else _bits(minima)
    )


def _typed(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else values


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values
