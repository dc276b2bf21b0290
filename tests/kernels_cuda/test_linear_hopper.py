"""``schedules/cuda/linear_hopper.py`` on the CUDA emulator: the right kernel for every number of rows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import gemm_split, gemv
from llmc.schedules.cuda import linear_hopper as family
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.kernels_cuda.emulated import call, check
from tests.support.cuda_emulator import source

TARGET = cuda.parse("cuda:sm_90a")
FEW_BLOCKS = {"kernel": "gemm_hopper", "tile": [128, 128], "cluster": 1, "blocks": 2}


def configuration(name: str, **changed: Any) -> dict[str, Any]:
    return {axis: values[0] for axis, values in family.space(family.SHAPES[name], TARGET).items()} | changed


@pytest.mark.parametrize(
    ("name", "n"),
    [("edges_136x328", 8), ("edges_136x328", 16), ("edges_136x328", 17), ("edges_136x328", 300), ("gated_144x264_f16", 3),
     ("gated_144x264_f16", 70), ("gated_144x264_f16", 258), ("small_64x64", 9), ("small_64x64", 65)],
)  # fmt: skip
def test_every_number_of_rows(name: str, n: int) -> None:
    case = family.SHAPES[name]
    assert family.matches(case, TARGET)
    arrays = random_arrays(case, {"n": n}, seed=n)
    result = call(family, case, TARGET, arrays, {"n": n}, {"257-512": FEW_BLOCKS, "513-1024": FEW_BLOCKS})
    check(family, case, result, family.reference(case, *arrays))


def test_a_kernel_for_each_bucket_and_none_twice() -> None:
    config = configuration("small_64x64")
    text = source(family.build(family.SHAPES["small_64x64"], TARGET, config), TARGET)
    different = len({str(config[rows]) for rows in family.BUCKETS})
    assert len(set(re.findall(r"__global__ void (?:__\w+__\([^)]*\) )*(\w+)\(", text))) == different
    assert different >= 4


def test_the_choice_follows_the_configuration() -> None:
    """With a kernel in place of another, rows in its bucket are its own to the last bit."""
    case = family.SHAPES["edges_136x328"]
    arrays = random_arrays(case, {"n": 5}, seed=3)
    chosen = family.candidates(case, "33-64")[0]
    split = {axis: value for axis, value in chosen.items() if axis != "kernel"}
    ours = call(family, case, TARGET, arrays, {"n": 5}, {"1-8": chosen})
    assert np.array_equal(ours.view(np.uint16), call(gemm_split, case, TARGET, arrays, {"n": 5}, split).view(np.uint16))


@pytest.mark.parametrize(("o", "k"), [(64, 64), (4096, 4096), (28672, 4096), (128256, 2048), (16, 8)])
@pytest.mark.parametrize("activation", ["none", "silu_gated"])
def test_every_candidate_is_one_that_its_kernel_can_be_built_with(o: int, k: int, activation: str) -> None:
    case = gemm_split._call(o, k, activation=activation)
    for rows in family.BUCKETS:
        found = family.candidates(case, rows)
        assert found
        assert len({str(config) for config in found}) == len(found)
        for config in found:
            if config["kernel"] == "gemm_split":
                assert config["split"] * config["share"] <= gemm_split.MOST_CLUSTER
                assert config["split"] <= -(-k // gemm_split.K_STEP)
                outputs, high, resident = config["tile"]
                sides = 1 + (activation == "silu_gated")
                stages = gemm_split.stages(outputs, high, resident)
                assert 4 * sides * high * (outputs // sides + 4) <= stages * (outputs + high) * gemm_split.K_STEP * 2
            elif config["kernel"] == "gemv":
                assert (config["warps"] // 2) * config["depth"] * gemv.CHUNK < max(k, 2) or config == found[0]


@pytest.mark.parametrize(
    ("o", "k", "kernel"),
    [(4096, 4096, "ring_gemv"), (2048, 8192, "ring_gemv"), (3072, 2048, "gemv"), (4096, 14336, "gemv"), (4096, 4104, "gemv")],
)
def test_few_rows_of_many_weights_stream_where_x_fits(o: int, k: int, kernel: str) -> None:
    call = gemm_split._call(o, k)
    assert family.candidates(call, "1-8")[0]["kernel"] == kernel
    assert family.candidates(call, "9-16")[0]["kernel"] == "gemv"


def test_tens_of_rows_have_low_tiles_where_they_fill_the_multiprocessors() -> None:
    shapes = [(4096, 14336), (2048, 8192), (4096, 4096), (6144, 4096), (5120, 3072), (128256, 4096)]
    first = [family.candidates(gemm_split._call(o, k), "17-32")[0] for o, k in shapes]
    low, high = [64, 32, 1], [128, 32, 1]
    assert [(c["tile"], c["split"]) for c in first] == [(low, 2), (low, 4), (low, 2), (low, 1), (high, 2), (high, 1)]
    assert family.candidates(gemm_split._call(4096, 14336), "33-64")[0]["tile"] == [128, 64, 1]


def test_what_it_does_not_take() -> None:
    assert family.matches(gemm_split._call(20, 64), TARGET) is None
    assert family.matches(gemm_split._call(64, 20), TARGET) is None
    assert family.matches(gemm_split._call(64, 64, "float32"), TARGET) is None
    assert family.matches(family.SHAPES["small_64x64"], cuda.parse("cuda:sm_90")) is None
