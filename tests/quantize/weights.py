"""Random operands of quantized kernels: weights rounded to a call's scheme and packed by its layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import QuantizedTensor, scheme
from llmc.schedules.protocol import KernelCall


def random_matrix(name: str, o: int, k: int, seed: int = 0) -> QuantizedTensor:
    """A normal matrix [o, k] with a few outliers, rounded to the scheme."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((o, k)).astype(np.float32) * 0.05
    weight[rng.integers(0, o, 3), rng.integers(0, k, 3)] *= 7
    return quantize(weight, scheme(name))


def linear_arrays(call: KernelCall, layout: Any, n: int, seed: int = 0) -> list[np.ndarray]:
    """x, the weight's parts, bias and residual of a ``llmc.quantized_linear`` over ``n`` rows."""
    rng = np.random.default_rng(seed)
    o, k = call.attr("o"), call.attr("k")
    arrays = [rng.standard_normal((n, k)).astype(np.float32), *layout.pack(random_matrix(call.attr("scheme"), o, k)).values()]
    if call.attr("bias"):
        arrays.append(rng.standard_normal(o).astype(np.float32))
    if call.attr("residual"):
        arrays.append(rng.standard_normal((n, o)).astype(np.float32))
    return arrays
