"""``schedules/cuda/gemv.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.cuda import gemv
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name, case in gemv.SHAPES.items() if case.args[1].shape[0] <= 128]


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, n in zip(SMALL, [1, 5, 9, 8, 1, 2, 17, 3, 10], strict=True)])
def test_reference(name: str, n: int) -> None:
    case = gemv.SHAPES[name]
    assert gemv.matches(case, TARGET)
    arrays = random_arrays(case, {"n": n}, seed=n)
    result = call(gemv, case, TARGET, arrays, {"n": n})
    check(gemv, case, result, gemv.reference(case, *arrays))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tail_48x1360_bias", {"warps": 2, "tiles": 2, "depth": 2, "columns": 16}),
        ("odd_19x72_f16_silu", {"warps": 4, "tiles": 2, "depth": 8, "columns": 32, "dependent_launch": False}),
        ("even_64x256", {"warps": 1, "depth": 8, "min_blocks": 2}),
        ("gated_48x320", {"warps": 2, "tiles": 2, "columns": 16}),
    ],
)
def test_configurations(name: str, config: dict[str, int]) -> None:
    case = gemv.SHAPES[name]
    arrays = random_arrays(case, {"n": 13}, seed=1)
    result = call(gemv, case, TARGET, arrays, {"n": 13}, config)
    check(gemv, case, result, gemv.reference(case, *arrays))


def test_rows_do_not_depend_on_the_batch() -> None:
    case = gemv.SHAPES["tail_48x1360_bias"]
    arrays = random_arrays(case, {"n": 11}, seed=2)
    many = call(gemv, case, TARGET, arrays, {"n": 11})
    one = call(gemv, case, TARGET, [arrays[0][9:10], *arrays[1:]], {"n": 1})
    assert np.array_equal(many[9:10].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = gemv.SHAPES["even_64x256"]
    assert gemv.matches(replace(case, phase="extend"), TARGET) is None
    assert gemv.matches(case, cuda.parse("cuda:sm_80")) is None
    assert gemv.matches(gemv._call(16, 20), TARGET) is None
    assert gemv.matches(gemv._call(16, 32, "float32"), TARGET) is None


def test_roofline() -> None:
    assert gemv.roofline(gemv.SHAPES["even_64x256"], n=2) == (2 * (2 * 256 + 64 * 256 + 2 * 64), 2 * 2 * 256 * 64)
