"""``schedules/cuda/quantized_gemv.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.cuda import quantized_gemv as gemv
from llmc.schedules.gpu.quantized_call import make
from llmc.targets import cuda
from tests.kernels.quantized_cases import operands
from tests.kernels_cuda.emulated import call, check
from tests.support.cuda_emulator.runner import source

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name, case in gemv.SHAPES.items() if case.attr("o") <= 128]
ROWS = [1, 5, 9, 8, 3, 2, 17]


@pytest.mark.parametrize(("name", "n"), [(name, ROWS[i % len(ROWS)]) for i, name in enumerate(SMALL)])
def test_reference(name: str, n: int) -> None:
    case = gemv.SHAPES[name]
    assert gemv.matches(case, TARGET)
    arrays = operands(case, n, seed=n)
    result = call(gemv, case, TARGET, arrays, {"n": n})
    check(gemv, case, result, gemv.reference(case, *arrays))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tail_48x1360_int4_g64_bias", {"warps": 2, "tiles": 2, "depth": 2, "columns": 16}),
        ("odd_19x72_f16_q4_0_silu", {"warps": 4, "tiles": 2, "depth": 1, "columns": 32, "dependent_launch": False}),
        ("even_64x256_int4_g128", {"warps": 1, "depth": 4, "min_blocks": 2}),
        ("int8_33x336_bias", {"warps": 2, "depth": 2, "tiles": 4}),
        ("zero_point_32x640_f16", {"warps": 2, "depth": 4, "tiles": 2}),
        ("fp8_blocks_32x392", {"warps": 1, "depth": 4, "tiles": 2, "columns": 16}),
    ],
)
def test_configurations(name: str, config: dict[str, int]) -> None:
    case = gemv.SHAPES[name]
    arrays = operands(case, 13, seed=1)
    result = call(gemv, case, TARGET, arrays, {"n": 13}, config)
    check(gemv, case, result, gemv.reference(case, *arrays))


def test_older_gpu() -> None:
    target, case = cuda.parse("cuda:sm_80"), gemv.SHAPES["tail_48x1360_int4_g64_bias"]
    assert gemv.matches(case, target)
    assert "griddepcontrol" not in source(gemv.build(case, target, {a: v[0] for a, v in gemv.space(case, target).items()}), target)
    arrays = operands(case, 3, seed=4)
    check(gemv, case, call(gemv, case, target, arrays, {"n": 3}), gemv.reference(case, *arrays))


def test_codes_are_exact() -> None:
    """x that picks one column out gives the weights themselves, rounded once."""
    for name in ("int4z_g32_f32", "int8p_g64_f32", "q5_1", "fp8_e4m3_b128"):
        case = make(32, 128, name, out="float32")
        arrays = operands(case, 8, seed=3)
        arrays[0] = np.eye(128, dtype=arrays[0].dtype)[40:56]
        result = call(gemv, case, TARGET, arrays, {"n": 16})
        wanted = gemv.reference(case, *arrays)
        assert np.abs(result - wanted).max() <= 2e-7 * np.abs(wanted).max(), name


def test_rows_do_not_depend_on_the_batch() -> None:
    case = gemv.SHAPES["tail_48x1360_int4_g64_bias"]
    arrays = operands(case, 11, seed=2)
    many = call(gemv, case, TARGET, arrays, {"n": 11})
    one = call(gemv, case, TARGET, [arrays[0][9:10], *arrays[1:]], {"n": 1})
    assert np.array_equal(many[9:10].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = gemv.SHAPES["even_64x256_int4_g128"]
    assert gemv.matches(replace(case, phase="extend"), TARGET) is None
    assert gemv.matches(make(16, 20, "int4_g32"), TARGET) is None
    assert gemv.matches(make(16, 32, "int4_g32", "float32"), TARGET) is None


def test_roofline() -> None:
    # 64 x 256 codes of 4 bits, 2 scales of 2 bytes to a row, x and the result.
    case = gemv.SHAPES["even_64x256_int4_g128"]
    assert gemv.roofline(case, n=2) == (64 * 128 + 64 * 2 * 2 + 2 * (2 * 256 + 2 * 64), 2 * 2 * 256 * 64)
