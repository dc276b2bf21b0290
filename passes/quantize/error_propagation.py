"""Weights that make up for what the layers before them got wrong.

Arai and Ichikawa, "Quantization Error Propagation" (arXiv:2504.09629). A layer of the quantized model sees inputs X̂ in place of X.
The weights whose results on X̂ are nearest to W X are

    W + W (X - X̂) X̂ᵀ (X̂ X̂ᵀ + λ I)⁻¹

and a method then rounds those. A part of the step is taken, and λ is large: all of it would fit the calibration text.
"""

from __future__ import annotations

import numpy as np
import torch

SHARE = 0.5
"""Of the step, the paper's choice."""
RIDGE = 0.1
"""λ as a part of the mean of the diagonal."""


def ridge_factor(moments: np.ndarray, ridge: float = RIDGE) -> torch.Tensor:
    """The lower Cholesky factor of X̂ X̂ᵀ + λ I, float64 [k, k], for inputs with second ``moments`` Σ x̂ x̂ᵀ, float32 [k, k]."""
    h = torch.from_numpy(moments.astype(np.float64))
    h.diagonal().add_(max(float(h.diagonal().mean()) * ridge, 1e-30))
    return torch.linalg.cholesky(h)


def make_up(weight: np.ndarray, factor: torch.Tensor, change: np.ndarray, share: float = SHARE) -> np.ndarray:
    """``weight`` float32 [o, k] for inputs x̂ that were x, with the :func:`ridge_factor` of x̂; ``change``: Σ (x - x̂) x̂ᵀ, float32
    [k, k]."""
    step = torch.cholesky_solve(torch.from_numpy((weight @ change).astype(np.float64)).T, factor).T
    corrected: np.ndarray = (weight + share * step.numpy()).astype(np.float32)
    return corrected
