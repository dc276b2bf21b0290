"""GPTQ: columns are rounded one after the other, and those still to come make up for the error of each.

Frantar et al., "GPTQ" (arXiv:2210.17323), algorithm 1, after Hassibi and Stork's optimal brain surgeon. With the second moments of
the layer's inputs H = Σ x xᵀ + λ I and the upper Cholesky factor U of H⁻¹ (H⁻¹ = Uᵀ U), rounding column j of W to q leaves the
error e = (w_j - q) / U_jj, and every later column c becomes w_c - e · U_jc. That is the change which keeps the expected squared
error ‖(W - Q) X‖² least.

Columns go in the order of falling H_jj (act-order): what sees large activations is rounded first, while there are many columns left
to correct it. Scales, minima and zero points are those of the groups as they are stored (static groups), found before the walk from
the weights with H_jj as the importance of a column; so the order needs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmc.errors import InternalError
from llmc.passes.quantize.round_to_nearest import encoder, quantize
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, floats

DAMPING = 0.01
"""λ as a part of the mean of the diagonal, as in the paper."""
BLOCK = 32
"""Columns whose corrections of the rest are applied at once, as one product of matrices."""


@dataclass(frozen=True)
class Walk:
    """What rounding takes of a layer's inputs; all layers that read the same inputs share it.

    ``importance``: H_jj without λ, float32 [k]; ``order``: the columns as they are walked; ``upper``: U in that order, float32
    [k, k].
    """

    importance: np.ndarray
    order: np.ndarray
    upper: np.ndarray


def walk(moments: np.ndarray, damping: float = DAMPING) -> Walk:
    """The walk for inputs with second ``moments`` Σ x xᵀ, float32 [k, k]."""
    importance = np.diagonal(moments)
    order = np.argsort(-importance, kind="stable")
    return Walk(importance, order, _inverse_factor(moments[np.ix_(order, order)], damping))


def gptq(weight: np.ndarray, inputs: Walk, scheme: Scheme) -> QuantizedTensor:
    """``weight`` float32 [o, k] in ``scheme``, for a layer's ``inputs``."""
    order, upper = inputs.order, inputs.upper
    grid = quantize(weight, scheme, inputs.importance)
    group = scheme.group or weight.shape[1]
    column_group = order // group
    scales, offsets, zeros = _grids(grid)
    encode = encoder(scheme)
    left = np.ascontiguousarray(weight.T[order])  # [k, o]: a column is contiguous
    codes = np.empty_like(left, dtype=grid.codes.dtype)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = np.empty((end - start, len(weight)), np.float32)
        for j in range(start, end):
            g, column = column_group[j], left[j]
            scale, offset, zero = scales[g], offsets[g], zeros[g]
            scaled = np.divide(column - offset, scale, out=np.zeros_like(column), where=scale != 0) + zero
            value, codes[j] = encode(scaled)
            error = (column - ((value - zero) * scale + offset)) / upper[j, j]
            errors[j - start] = error
            left[j + 1 : end] -= upper[j, j + 1 : end, None] * error
        left[end:] -= upper[start:end, end:].T @ errors
    stored = np.empty_like(grid.codes)
    stored[:, order] = codes.T
    return QuantizedTensor(scheme, stored, grid.scales, zeros=grid.zeros, minima=grid.minima)


def _grids(grid: QuantizedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, minima and zero points as float32 [groups, o], zeros where the scheme has none."""
    scales = floats(grid.scales, grid.scheme.scale_dtype).T.copy()
    none = np.zeros_like(scales)
    minima = none if grid.minima is None else floats(grid.minima, grid.scheme.scale_dtype).T.copy()
    zeros = none if grid.zeros is None else grid.zeros.T.astype(np.float32)
    return scales, minima, zeros


def _inverse_factor(moments: np.ndarray, damping: float) -> np.ndarray:
    """The upper Cholesky factor of (moments + λ I)⁻¹, float32. λ grows tenfold while the matrix is not positive definite."""
    h = torch.from_numpy(moments.astype(np.float64))
    mean = max(float(h.diagonal().mean()), 1e-30)
    for attempt in range(6):
        damped = h + torch.eye(len(h), dtype=h.dtype) * (mean * damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor: np.ndarray = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).numpy().astype(np.float32)
            return factor
    raise InternalError("the second moments of a layer's inputs have no Cholesky factor")
