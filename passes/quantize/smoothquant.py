"""SmoothQuant: outliers of the activations move into the weights, so that both can be rounded to 8 bits.

Xiao et al., "SmoothQuant" (arXiv:2211.10438). W x = (W · diag(s)) (x / s) exactly, for scales s of the input channels that all
layers which read x share. The paper takes s_j = (max |x_j| / max |W_j|)^½. Here sizes are root mean squares:

    s_j = (a_j / w_j)^½,   a_j² = mean over tokens of x_j² / ‖x‖²,   w_j² = Σ over layers and rows of W_ij²

Rounded activations err by about one amount e in every channel of x / s, and the result by e² Σ (w_j s_j)²; rounded weights err
alike in every column of W · diag(s), and the result by e'² Σ (a_j / s_j)². By Cauchy and Schwarz the one sum times the other is at
least (Σ w_j a_j)², and that is what it is for this s. A token counts by its direction alone: the first of a text may be a thousand
times as large as the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from llmc.importer.params import DTYPES, Derived, Source

NAME = "smoothquant"
LEAST = 1e-4
"""Of the largest channel's size: what is smaller counts as this, so that no scale gets out of bounds."""


def sizes(x: np.ndarray) -> np.ndarray:
    """a, float32 [k], of rows x [n, k]."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    found: np.ndarray = np.sqrt(np.square(unit).mean(axis=0))
    return found


def smooth(weights: Sequence[np.ndarray], size: np.ndarray) -> np.ndarray:
    """The scales s, float32 [k], for matrices [o, k] that read inputs of the :func:`sizes` ``size``. Their geometric mean is 1;
    channels that are never used, or that no weight reads, keep 1."""
    by_weight = np.sqrt(sum(np.square(w).sum(axis=0, dtype=np.float64) for w in weights))
    used = (size > 0) & (by_weight > 0)
    s = np.ones(len(size))
    if used.any():
        a, w = (np.maximum(v[used], LEAST * v.max()) for v in (size, by_weight))
        s[used] = np.sqrt(a / w)
        s[used] /= np.exp(np.log(s[used]).mean())
    return s.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Smoothed(Derived):
    """``source`` [o, k] with its columns multiplied by ``scales``, float32 [k], and its rows by ``row_factors``, float32 [o] or
    None. It is rounded when it is read for the artifact, as any other matrix is."""

    source: Source
    scales: np.ndarray
    row_factors: np.ndarray | None = None

    def read(self) -> np.ndarray:
        value = self.source.read().astype(np.float32)
        value *= self.scales
        if self.row_factors is not None:
            value *= self.row_factors[:, None]
        return value.astype(DTYPES[self.dtype], copy=False)

    def describe(self) -> str:
        factors = [a.tobytes() for a in (self.scales, self.row_factors) if a is not None]
        return f"{NAME} {sha256(b''.join(factors)).hexdigest()[:16]}({self.source.describe()})"
