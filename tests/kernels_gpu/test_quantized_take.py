"""``schedules/gpu/quantized_take.py`` on the emulator: every value is the dequantized one, rounded once."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.gpu import layout_mma, quantized_take
from llmc.targets import cuda
from tests.kernels.harness import DTYPES
from tests.kernels.quantized_cases import as_dtype, random_quantized
from tests.kernels_cuda.emulated import call

TARGET = cuda.parse("cuda:sm_80")
TAKE = [name for name, case in quantized_take.SHAPES.items() if case.attr("o") < 1000]


@pytest.mark.parametrize("name", TAKE)
def test_take(name: str) -> None:
    """Every value is the dequantized one, rounded once."""
    case = quantized_take.SHAPES[name]
    assert quantized_take.matches(case, TARGET)
    how, o, k = scheme(case.attr("scheme")), case.attr("o"), case.attr("k")
    rng = np.random.default_rng(5)
    parts = layout_mma.pack(random_quantized(how, o, k, rng))
    ids = np.array([o - 1, 0, 3, o - 1, 8], np.int32)
    arrays = [ids, *(as_dtype(parts[name], spec.dtype) for name, spec in layout_mma.parts(how, o, k).items())]
    result = call(quantized_take, case, TARGET, arrays, {"n": ids.size})
    wanted = quantized_take.reference(case, *arrays).astype(np.float32)
    # A multiply-add may be contracted: one rounding less than in NumPy.
    slack = 1e-6 if how.offset == "minimum" else 0.0
    rounded = wanted.astype(DTYPES[case.result.dtype]).astype(np.float32)
    assert np.allclose(result.astype(np.float32), rounded, rtol=slack, atol=slack)
