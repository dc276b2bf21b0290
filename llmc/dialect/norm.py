"""``llmc.rms_norm`` and ``llmc.layer_norm``: normalisation over the last axis.

``llmc.rms_norm(x [..., d], weight [d])``: x / sqrt(mean(x²) + eps) · (weight + offset); ``offset`` is 1.0 for the families
that store weight - 1, else 0.0 (Zhang & Sennrich, 2019, "Root Mean Square Layer Normalization").
``llmc.layer_norm(x [..., d], weight [d], bias [d])``: (x - mean) / sqrt(var + eps) · weight + bias (Ba et al., 2016).
The result has the type of x; statistics are float32.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from llmc.dialect.core import call, register

RMS_NORM = "llmc.rms_norm"
LAYER_NORM = "llmc.layer_norm"


def rms_norm(x: relax.Expr, weight: relax.Expr, eps: float, offset: float = 0.0) -> relax.Call:
    return call(RMS_NORM, x, weight, eps=float(eps), offset=float(offset))


def layer_norm(x: relax.Expr, weight: relax.Expr, bias: relax.Expr, eps: float) -> relax.Call:
    return call(LAYER_NORM, x, weight, bias, eps=float(eps))


register(RMS_NORM, lambda c, _: c.args[0].ty)
register(LAYER_NORM, lambda c, _: c.args[0].ty)


def rms_norm_reference(x: np.ndarray, weight: np.ndarray, *, eps: float, offset: float = 0.0) -> np.ndarray:
    """float64 reference of ``llmc.rms_norm``."""
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (weight.astype(np.float64) + offset)


def layer_norm_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, eps: float) -> np.ndarray:
    """float64 reference of ``llmc.layer_norm``."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return scaled * weight.astype(np.float64) + bias.astype(np.float64)
