"""``schedules/cuda/gemm_hopper.py`` on the CUDA emulator."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import gemm_hopper as family
from llmc.schedules.cuda import linear_call
from llmc.targets import cuda
from tests.kernels.harness import DTYPES, random_arrays
from tests.kernels_cuda.emulated import call, check
from tests.support.cuda_emulator import launchable, source

TARGET = cuda.parse("cuda:sm_90a")
BLOCKS = {"blocks": 3}
"""Few, so that each works through several tiles."""

ROWS = {
    "small_256x192": 200,
    "edges_328x200_bias": 130,
    "f16_192x72_silu": 65,
    "residual_328x136_gelu": 300,
    "relu_64x64": 1,
    "relu2_72x320": 33,
    "gelu_tanh_136x128": 129,
    "logits_264x128": 70,
    "gated_656x136": 131,
    "gated_144x72_residual": 65,
}


@pytest.mark.parametrize("name", ROWS)
def test_reference(name: str) -> None:
    case, symbols = family.SHAPES[name], {"n": ROWS[name]}
    assert family.matches(case, TARGET)
    arrays = random_arrays(case, symbols, seed=len(name))
    result = call(family, case, TARGET, arrays, symbols, BLOCKS)
    check(family, case, result, family.reference(case, *arrays))


@pytest.mark.parametrize("name", ["residual_328x136_gelu", "gated_656x136"])
@pytest.mark.parametrize(
    "config",
    [
        {"tile": (128, 128)},
        {"tile": (128, 192)},
        {"tile": (64, 256)},
        {"tile": (64, 128), "dependent_launch": False},
        {"tile": (128, 256), "cluster": 2, "blocks": 4},
        {"tile": (64, 128), "cluster": 2, "blocks": 2},
        {"tile": (64, 128), "cluster": "rows", "blocks": 2},
    ],
)
def test_configurations(name: str, config: dict[str, Any]) -> None:
    case, symbols = family.SHAPES[name], {"n": 150}
    if case.result.shape[1] != case.args[1].shape[0] and config["tile"] == (128, 192):
        config = {"tile": (128, 256)}  # gated, half a tile is whole chunks of 64
    arrays = random_arrays(case, symbols, seed=1)
    result = call(family, case, TARGET, arrays, symbols, BLOCKS | config)
    check(family, case, result, family.reference(case, *arrays))


@pytest.mark.parametrize(("tiles", "kernel"), [(2, "cluster"), (3, "one block"), (4, "narrow")])
def test_a_kernel_by_the_number_of_rows(tiles: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of a function, with the same bits."""
    monkeypatch.setattr(family, "_sooner", lambda row_tiles, *_: row_tiles > 3)
    case, symbols = family.SHAPES["residual_328x136_gelu"], {"n": 64 * tiles - 7}
    arrays = random_arrays(case, symbols, seed=3)
    config = {**BLOCKS, "tile": (64, 256), "blocks": 4}
    function = family.build(case, TARGET, {**config, "cluster": "rows", "dependent_launch": True})
    kernels = re.findall(r"__global__ void[^;{]*\{", source(function, TARGET))
    assert len(kernels) == 3, kernels
    chosen = launchable(function, TARGET)(*arrays, np.full(case.result.bind(symbols), np.nan, DTYPES["bfloat16"]))[-1]
    alone = call(family, case, TARGET, arrays, symbols, {**BLOCKS, "tile": (64, 256)})
    assert np.array_equal(chosen.view(np.uint16), alone.view(np.uint16))


def test_narrow_tiles_where_they_take_less_time() -> None:
    """o, qkv and down of an 8B model by the formula: rounds of 132 tiles, each as long as it is wide and 32 columns more."""
    for o, wide, narrow in ((4096, (2048, 2688, 4096), (1152, 1536, 2176, 3200)), (6144, (1408, 2048, 3200), (1536, 2176, 3584))):
        case = linear_call.sample(o, 4096)
        assert family._narrower(case, 256) == 192
        for rows in (*wide, *narrow):
            assert bool(family._sooner(-(-rows // 128), o, 192, 256)) == (rows in narrow)
    assert family._narrower(linear_call.sample(28672, 4096, activation="silu_gated"), 256) is None
    assert family.candidates(linear_call.sample(4096, 4096), None)[0] == ((128, 256), "rows")


def test_rows_do_not_depend_on_the_batch() -> None:
    case = family.SHAPES["edges_328x200_bias"]
    arrays = random_arrays(case, {"n": 140}, seed=2)
    many = call(family, case, TARGET, arrays, {"n": 140}, BLOCKS)
    one = call(family, case, TARGET, [arrays[0][135:136], *arrays[1:]], {"n": 1}, BLOCKS)
    assert np.array_equal(many[135:136].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = family.SHAPES["small_256x192"]
    assert family.matches(replace(case, op="llmc.moe"), TARGET) is None
    assert family.matches(case, cuda.parse("cuda:sm_90")) is None
    assert family.matches(family._call(20, 64), TARGET) is None
    assert family.matches(family._call(64, 20), TARGET) is None
    assert family.matches(family._call(64, 64, "float32"), TARGET) is None


def test_pipeline_fits_shared_memory() -> None:
    for rows, columns in family.space(family.SHAPES["square_4096"], TARGET)["tile"]:
        used = family.stages(rows, columns) * (rows + columns) * family.K_STEP * 2 + rows // 64 * (16 << 10)
        assert family.stages(rows, columns) >= 3
        assert used + 1024 <= TARGET.shared_memory


def test_roofline() -> None:
    assert family.roofline(family.SHAPES["small_256x192"], n=2) == (2 * (2 * 192 + 256 * 192 + 2 * 256), 2 * 2 * 256 * 192)
