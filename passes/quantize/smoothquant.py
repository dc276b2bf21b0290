"""SmoothQuant: outliers of the activations move into the weights, so that both can be rounded to 8 bits.

Xiao et al., "SmoothQuant" (arXiv:2211.10438). W x = (W · diag(s)) (x / s) exactly, with

    s_j = max |x_j|^α / max |W_j|^(1 - α)

for input channel j, over all tokens and all layers that read x. A token's activations then share one 8-bit scale with less loss:
the largest of them no longer dwarfs the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ALPHA = 0.5
"""How much of the difficulty goes to the weights; the paper's value for most models."""


def smooth(weights: Sequence[np.ndarray], largest: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """The scales s, float32 [k], for matrices [o, k] that read inputs whose channels reach ``largest`` [k]. Their geometric mean is
    1; channels that are never used, or that no weight reads, keep 1."""
    by_weight = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
    used = (largest > 0) & (by_weight > 0)
    s = np.ones(len(largest))
    s[used] = largest[used] ** alpha / by_weight[used] ** (1 - alpha)
    s[used] /= np.exp(np.log(s[used]).mean()) if used.any() else 1.0
    return s.astype(np.float32)
