"""AWQ: input channels that see large activations are scaled up before rounding, and what feeds them scaled down.

Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978). W x = (W · diag(s)) (x / s) exactly, but rounding W ·
diag(s) spends the precision on the channels with a large s. s = a^α, where a is the size of a channel's activations and α in [0,
1] is searched on a grid for the least squared error of the layers' results,

    ‖(Q(W diag(s)) diag(s)⁻¹ - W) X‖² = tr(D H Dᵀ),   D = Q(W diag(s)) diag(s)⁻¹ - W,   H = X Xᵀ.

All layers that read the same x share s. The paper takes the mean of |x| for a; here it is the root of the mean of x², which H
holds. The clipping it searches afterwards is the importance of :mod:`.round_to_nearest`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme

STEPS = 20
"""Values of α tried, as in the paper."""
ROWS = 256
"""Rows of each matrix that the search looks at, evenly spread: s belongs to columns, and so many rows agree on it."""
NO_SEARCH = (1.0,)


def search(weights: Sequence[tuple[np.ndarray, Scheme]], moments: np.ndarray) -> tuple[np.ndarray, float]:
    """The scales s, float32 [k], for matrices [o, k] with their schemes that read inputs with second ``moments``, and the squared
    error with them over that without."""
    size = np.sqrt(np.maximum(np.diagonal(moments), 1e-12 * max(float(np.diagonal(moments).max()), 1e-30)))
    samples = [(w[:: -(-len(w) // ROWS)], how) for w, how in weights]
    best, least, plain = np.ones(len(size), np.float32), np.inf, np.inf
    for step in range(STEPS):
        s = size ** (step / STEPS)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        error = sum(output_error(w, _scaled_back(w, s, how), moments) for w, how in samples)
        plain = error if step == 0 else plain
        if error < least:
            best, least = s, error
    return best, least / plain if plain > 0 else 1.0


def _scaled_back(weight: np.ndarray, s: np.ndarray, how: Scheme) -> np.ndarray:
    return quantize(weight * s, how, clippings=NO_SEARCH).dequantize() / s


def output_error(weight: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """‖(rounded - weight) X‖² over all inputs X with second ``moments``."""
    difference = rounded - weight
    return float(np.vdot(difference @ moments, difference))


def awq(weight: np.ndarray, s: np.ndarray, moments: np.ndarray, scheme: Scheme) -> QuantizedTensor:
    """``weight`` · diag(s) in ``scheme``."""
    return quantize(weight * s, scheme, np.diagonal(moments) / s**2)
