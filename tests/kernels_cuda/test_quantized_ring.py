"""``schedules/cuda/quantized_ring.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import quantized_ring
from llmc.schedules.gpu.quantized_call import make
from llmc.targets import cuda
from tests.kernels.quantized_cases import operands
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name, case in quantized_ring.SHAPES.items() if case.attr("o") <= 128]


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, n in zip(SMALL, [1, 5, 3, 8, 9, 2, 7, 1], strict=True)])
def test_reference(name: str, n: int) -> None:
    case = quantized_ring.SHAPES[name]
    assert quantized_ring.matches(case, TARGET)
    arrays = operands(case, n, seed=n)
    result = call(quantized_ring, case, TARGET, arrays, {"n": n})
    check(quantized_ring, case, result, quantized_ring.reference(case, *arrays))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tail_48x1360_fp8_bias", {"split": [4, 1], "ring": 24 << 10}),
        ("tail_48x1360_fp8_bias", {"split": [16, 1], "columns": 16}),
        ("gated_96x640_int8", {"split": [4, 1], "columns": 2, "ring": 40 << 10, "dependent_launch": False}),
        ("even_64x512_int8", {"split": [2, 2], "columns": 1}),
    ],
)
def test_configurations(name: str, config: dict[str, Any]) -> None:
    case = quantized_ring.SHAPES[name]
    arrays = operands(case, 11, seed=1)
    result = call(quantized_ring, case, TARGET, arrays, {"n": 11}, config)
    check(quantized_ring, case, result, quantized_ring.reference(case, *arrays))


@pytest.mark.parametrize("split", [[4, 1], [2, 2]])
def test_blocks_that_take_several_tiles(split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of four multiprocessors rings and partial sums go round."""
    monkeypatch.setattr(quantized_ring, "MULTIPROCESSORS", 4)
    case = make(16 * 21 + 3, 768, "int8", residual=1)
    arrays = operands(case, 3, seed=4)
    result = call(quantized_ring, case, TARGET, arrays, {"n": 3}, {"split": split, "ring": 24 << 10})
    check(quantized_ring, case, result, quantized_ring.reference(case, *arrays))


def test_rows_do_not_depend_on_the_batch() -> None:
    case = quantized_ring.SHAPES["tail_48x1360_fp8_bias"]
    arrays = operands(case, 11, seed=2)
    many = call(quantized_ring, case, TARGET, arrays, {"n": 11})
    one = call(quantized_ring, case, TARGET, [arrays[0][9:10], *arrays[1:]], {"n": 1})
    assert np.array_equal(many[9:10].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = quantized_ring.SHAPES["even_64x512_int8"]
    assert quantized_ring.matches(replace(case, phase="extend"), TARGET) is None
    assert quantized_ring.matches(case, cuda.parse("cuda:sm_80")) is None
    assert quantized_ring.matches(make(64, 512, "int4_g128"), TARGET) is None
    assert quantized_ring.matches(make(64, 1 << 17, "int8"), TARGET) is None


def test_a_long_row_leaves_room_for_fewer_rows() -> None:
    long = quantized_ring.SHAPES["down_4096x14336_fp8"]
    assert quantized_ring.splits(long, 4) and not quantized_ring.splits(long, 8)
    assert quantized_ring.space(long, TARGET)["columns"][0] == 4


def test_roofline() -> None:
    # 64 x 512 codes of 8 bits, a scale of 2 bytes to a row, x and the result.
    case = quantized_ring.SHAPES["even_64x512_int8"]
    assert quantized_ring.roofline(case, n=2) == (64 * 512 + 64 * 2 + 2 * (2 * 512 + 2 * 64), 2 * 2 * 512 * 64)
