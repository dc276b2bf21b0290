"""The check for broken weights, run on every tensor while it streams past: one NaN in a model makes every logit NaN."""

from __future__ import annotations

import numpy as np

from llmc.errors import ModelError
from llmc.importer.params import Source

_CHUNK = 1 << 22  # elements looked at in one go: the temporary mask stays a few MB


def check_finite(array: np.ndarray, source: Source) -> None:
    """Raise ModelError if ``array``, as read from ``source``, holds a NaN or an infinity: the tensor, how many, where first.

    Integers and booleans pass. Memory: a fixed few MB, whatever the array's size.
    """
    if array.dtype.kind not in "fV":  # V: bfloat16
        return
    flat = array.reshape(-1)
    bad, first = 0, -1
    for start in range(0, flat.size, _CHUNK):
        broken = ~np.isfinite(flat[start : start + _CHUNK])
        count = int(np.count_nonzero(broken))
        if count and first < 0:
            first = start + int(np.argmax(broken))
        bad += count
    if bad:
        index = tuple(int(i) for i in np.unravel_index(first, array.shape)) if array.ndim else ()
        raise ModelError(
            f"{source.describe()} holds {bad} NaN or infinite value{'s' if bad > 1 else ''} out of {flat.size} "
            f"(first: {flat[first]} at index {list(index)}): the checkpoint is broken, download or convert it again"
        )
