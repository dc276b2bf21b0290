"""``schedules/cuda/attend_simple.py`` on the CUDA emulator."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.cuda import attend_simple
from llmc.targets import cuda
from tests.kernels.harness import error, paged_arrays
from tests.kernels_cuda.emulated import TOLERANCE, call

TARGET = cuda.parse("cuda:sm_80")
BATCHES = {"decode": ([131, 1, 40], [1, 1, 1]), "extend": ([140, 5, 9], [2, 5, 1])}


@pytest.mark.parametrize("name", [name for name in attend_simple.SHAPES if name != "heads_32x8_128"])
def test_reference(name: str) -> None:
    case = attend_simple.SHAPES[name]
    assert attend_simple.matches(case, TARGET)
    arrays, symbols = paged_arrays(case, *BATCHES[case.phase], seed=3)
    result = call(attend_simple, case, TARGET, arrays, symbols)
    assert error(result, attend_simple.reference(case, *arrays)) < TOLERANCE[case.result.dtype]


def test_padding_rows_are_finite() -> None:
    case = attend_simple.SHAPES["decode_64"]
    arrays, symbols = paged_arrays(case, [3, 0], [1, 1], seed=4)
    result = call(attend_simple, case, TARGET, arrays, symbols).astype(np.float32)
    assert np.isfinite(result).all()
    assert not result[1].any()
