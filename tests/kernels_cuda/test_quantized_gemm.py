"""``schedules/cuda/quantized_gemm.py`` on the CUDA emulator."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.cuda import cluster_finish
from llmc.schedules.cuda import quantized_gemm as gemm
from llmc.schedules.gpu.quantized_call import make
from llmc.targets import cuda
from tests.kernels.quantized_cases import operands
from tests.kernels_cuda.emulated import TOLERANCE, call, check
from tests.support.cuda_emulator.runner import source

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name, case in gemm.SHAPES.items() if case.attr("o") <= 256]
TILES = [(64, 32, 2), (64, 64, 1), (128, 32, 1), (64, 16, 3)]


@pytest.mark.parametrize(
    ("name", "n", "tile", "split"),
    [(name, (40, 70, 17, 9)[i % 4], TILES[i % 4], (1, 2, 4)[i % 3]) for i, name in enumerate(SMALL)],
)
def test_reference(name: str, n: int, tile: tuple[int, int, int], split: int) -> None:
    case = gemm.SHAPES[name]
    assert gemm.matches(case, TARGET)
    arrays = operands(case, n, seed=n)
    result = call(gemm, case, TARGET, arrays, {"n": n}, {"tile": tile, "split": split})
    # A weight that has a scale per group is rounded to x's dtype before it is multiplied.
    coarser = max(case.result.dtype, case.args[0].dtype, key=TOLERANCE.__getitem__)
    check(gemm, case, result, gemm.reference(case, *arrays), coarser)


def test_wide_tile() -> None:
    case = gemm.SHAPES["small_128x256_int4_g128"]
    arrays = operands(case, 300, seed=1)
    result = call(gemm, case, TARGET, arrays, {"n": 300}, {"tile": (128, 256, 1), "depth": 2})
    check(gemm, case, result, gemm.reference(case, *arrays))


def test_columns_of_k_meet_their_own() -> None:
    """x that picks one column out gives the weights themselves, rounded to its dtype once."""
    for name in ("int4z_g32_f32", "int8", "fp8_e4m3_b128"):
        case = make(64, 128, name, phase="extend", out="float32")
        arrays = operands(case, 128, seed=3)
        arrays[0] = np.eye(128, dtype=arrays[0].dtype)
        result = call(gemm, case, TARGET, arrays, {"n": 128}, {"tile": (64, 64, 1)})
        wanted = gemm.reference(case, *arrays)
        assert np.all(np.abs(result - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-7), name


def test_rows_do_not_depend_on_the_batch() -> None:
    case = gemm.SHAPES["edges_72x200_q4_1_bias"]
    arrays = operands(case, 50, seed=2)
    config = {"tile": (64, 32, 2), "split": 2}
    many = call(gemm, case, TARGET, arrays, {"n": 50}, config)
    one = call(gemm, case, TARGET, [arrays[0][33:34], *arrays[1:]], {"n": 1}, config)
    assert np.array_equal(many[33:34].view(np.uint16), one.view(np.uint16))


@pytest.mark.parametrize("tile", [(128, 128, 1), (128, 64, 2), (128, 32, 2), (64, 64, 1)])
def test_sums_stay_clear_of_the_barriers(tile: tuple[int, int, int]) -> None:
    """An arrival that is late would land in them: no emulator sees it, and a GPU only now and then."""
    case = make(256, 1024, "int8", phase="extend", activation="silu_gated")
    config = {axis: values[0] for axis, values in gemm.space(case, TARGET).items()} | {"tile": tile, "split": 1}
    text = source(gemm.build(case, TARGET, config), TARGET)
    barriers = [int(n) for n in re.findall(r"mbarrier_init\w*\(\w+\(\(&\(\(\(uint64_t\*\)pool_buf_ptr\)\[(\d+)\]", text)]
    assert len(barriers) >= 4
    assert 8 * min(barriers) >= 4 * 2 * tile[1] * cluster_finish.pitch(tile[0])


def test_what_it_does_not_take() -> None:
    case = gemm.SHAPES["small_128x256_int4_g128"]
    assert gemm.matches(case, cuda.parse("cuda:sm_80")) is None
    assert gemm.matches(make(16, 20, "int4_g32"), TARGET) is None
    assert gemm.matches(make(16, 32, "int4_g32", "float32"), TARGET) is None
    assert gemm.matches(make(40, 64, "int4_g32", activation="silu_gated"), TARGET) is None
    assert gemm.matches(replace(case, op="llmc.linear"), TARGET) is None
