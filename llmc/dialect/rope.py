"""``llmc.rope``: rotary position embedding (Su et al., 2021, "RoFormer").

``x [n, h, d]``, ``cos [n, r]``, ``sin [n, r]`` (full width, as transformers hands them over) -> ``[n, h, d]``:
``y[..., :r] = x[..., :r] · cos + rotate(x[..., :r]) · sin``; the other ``d - r`` values pass through.

- ``rotary_dim`` r ≤ d, even.
- ``interleaved = 0``: rotate(x) = [-x[r/2:], x[:r/2]] (halves); ``1``: rotate(x)[2i] = -x[2i+1], rotate(x)[2i+1] = x[2i] (pairs).
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from llmc.dialect.core import call, register

OP = "llmc.rope"


def rope(x: relax.Expr, cos: relax.Expr, sin: relax.Expr, rotary_dim: int, interleaved: bool = False) -> relax.Call:
    return call(OP, x, cos, sin, rotary_dim=int(rotary_dim), interleaved=int(interleaved))


register(OP, lambda c, _: c.args[0].ty)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, rotary_dim: int, interleaved: int = 0) -> np.ndarray:
    """``llmc.rope`` in the arrays' own dtype."""
    part = x[..., :rotary_dim]
    if interleaved:
        turned = np.stack((-part[..., 1::2], part[..., 0::2]), axis=-1).reshape(part.shape)
    else:
        half = rotary_dim // 2
        turned = np.concatenate((-part[..., half:], part[..., :half]), axis=-1)
    y = x.copy()
    y[..., :rotary_dim] = part * cos[:, None, :] + turned * sin[:, None, :]
    return y


def reference(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, rotary_dim: int, interleaved: int = 0) -> np.ndarray:
    """float64 reference of ``llmc.rope``."""
    x, cos, sin = (a.astype(np.float64) for a in (x, cos, sin))
    return rotated(x, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved)
