"""``schedules/cuda/linear_simple.py`` on the CUDA emulator."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.cuda import linear_simple
from llmc.targets import cuda
from tests.kernels.harness import error, random_arrays
from tests.kernels_cuda.emulated import TOLERANCE, call

TARGET = cuda.parse("cuda:sm_80")
SMALL = [name for name, case in linear_simple.SHAPES.items() if case.args[1].shape[0] <= 256]


@pytest.mark.parametrize(("name", "n"), list(zip(SMALL, [5, 3, 1, 2, 65, 7, 3, 70], strict=True)))
def test_reference(name: str, n: int) -> None:
    case = linear_simple.SHAPES[name]
    assert linear_simple.matches(case, TARGET)
    arrays = random_arrays(case, {"n": n}, seed=n)
    result = call(linear_simple, case, TARGET, arrays, {"n": n})
    assert error(result, linear_simple.reference(case, *arrays)) < TOLERANCE[case.result.dtype]


@pytest.mark.parametrize("name", ["decode_19x57", "extend_130x37"])
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    case = linear_simple.SHAPES[name]
    arrays = random_arrays(case, {"n": 6}, seed=2)
    many = call(linear_simple, case, TARGET, arrays, {"n": 6})
    part = [a[4:5] if spec.shape[0] == "n" else a for a, spec in zip(arrays, case.args, strict=True)]
    one = call(linear_simple, case, TARGET, part, {"n": 1})
    assert np.array_equal(many[4:5].view(np.uint16), one.view(np.uint16))
