"""``schedules/cuda/ring_gemv.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import ring_gemv
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name, case in ring_gemv.SHAPES.items() if case.args[1].shape[0] <= 320]


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, n in zip(SMALL, [1, 5, 3, 8, 9, 2, 7], strict=True)])
def test_reference(name: str, n: int) -> None:
    case = ring_gemv.SHAPES[name]
    assert ring_gemv.matches(case, TARGET)
    arrays = random_arrays(case, {"n": n}, seed=n)
    result = call(ring_gemv, case, TARGET, arrays, {"n": n})
    check(ring_gemv, case, result, ring_gemv.reference(case, *arrays))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tail_48x1344_bias", {"split": [4, 4], "ring": 24 << 10}),
        ("tail_48x1344_bias", {"split": [16, 1], "columns": 16}),
        ("gated_96x320", {"split": [4, 1], "ring": 24 << 10, "dependent_launch": False}),
    ],
)
def test_configurations(name: str, config: dict[str, Any]) -> None:
    case = ring_gemv.SHAPES[name]
    arrays = random_arrays(case, {"n": 11}, seed=1)
    result = call(ring_gemv, case, TARGET, arrays, {"n": 11}, config)
    check(ring_gemv, case, result, ring_gemv.reference(case, *arrays))


@pytest.mark.parametrize("split", [[4, 1], [4, 2]])
def test_blocks_that_take_several_tiles(split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of four multiprocessors rings and partial sums go round."""
    monkeypatch.setattr(ring_gemv, "MULTIPROCESSORS", 4)
    case = ring_gemv._call(16 * 21 + 3, 512, residual=1)
    arrays = random_arrays(case, {"n": 3}, seed=4)
    result = call(ring_gemv, case, TARGET, arrays, {"n": 3}, {"split": split, "ring": 24 << 10})
    check(ring_gemv, case, result, ring_gemv.reference(case, *arrays), "bfloat16")


def test_rows_do_not_depend_on_the_batch() -> None:
    case = ring_gemv.SHAPES["tail_48x1344_bias"]
    arrays = random_arrays(case, {"n": 11}, seed=2)
    many = call(ring_gemv, case, TARGET, arrays, {"n": 11})
    one = call(ring_gemv, case, TARGET, [arrays[0][9:10], *arrays[1:]], {"n": 1})
    assert np.array_equal(many[9:10].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = ring_gemv.SHAPES["even_64x512"]
    assert ring_gemv.matches(replace(case, phase="extend"), TARGET) is None
    assert ring_gemv.matches(case, cuda.parse("cuda:sm_80")) is None
    assert ring_gemv.matches(ring_gemv._call(16, 20), TARGET) is None
    assert ring_gemv.matches(ring_gemv._call(16, 1 << 17), TARGET) is None


def test_roofline() -> None:
    assert ring_gemv.roofline(ring_gemv.SHAPES["even_64x512"], n=2) == (2 * (2 * 512 + 64 * 512 + 2 * 64), 2 * 2 * 512 * 64)
