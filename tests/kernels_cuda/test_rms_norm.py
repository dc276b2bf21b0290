"""``schedules/cuda/rms_norm.py`` on the CUDA emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import rms_norm as family
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")


@pytest.mark.parametrize("name", family.SHAPES)
@pytest.mark.parametrize("config", [{}, {"dependent_launch": False}])
def test_reference(name: str, config: dict[str, Any]) -> None:
    case, symbols = family.SHAPES[name], {"n": 7}
    assert family.matches(case, TARGET)
    arrays = random_arrays(case, symbols, seed=5)
    result = call(family, case, TARGET, arrays, symbols, config)
    check(family, case, result, family.reference(case, *arrays))
    alone = call(family, case, TARGET, [arrays[0][3:4], arrays[1]], {"n": 1}, config)
    assert np.array_equal(result[3:4].view(np.uint16), alone.view(np.uint16))


def test_what_it_does_not_take() -> None:
    assert family.matches(family.SHAPES["hidden_4096"], cuda.parse("cuda:sm_90")) is None
    for shape, dtype in ((("n", 8200), "bfloat16"), (("n", 60), "bfloat16"), (("n", 2, 64), "bfloat16"), (("n", 64), "float32")):
        assert family.matches(family.norm._rms(shape, 0.0, dtype), TARGET) is None


def test_roofline() -> None:
    assert family.roofline(family.SHAPES["hidden_56"], n=2) == (2 * 2 * 2 * 56 + 2 * 56, 4 * 2 * 56)
