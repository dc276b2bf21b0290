"""``schedules/cuda/gemm_split.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import cluster_finish
from llmc.schedules.cuda import gemm_split as family
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.kernels_cuda.emulated import call, check
from tests.support.cuda_emulator import source

TARGET = cuda.parse("cuda:sm_90a")
ROWS = {
    "small_256x576": 20,
    "edges_328x392_bias": 130,
    "f16_192x264_silu": 65,
    "residual_136x640_gelu": 33,
    "gated_272x328": 70,
    "gated_48x256_f16_bias": 17,
    "logits_264x256": 1,
}


@pytest.mark.parametrize("name", ROWS)
def test_reference(name: str) -> None:
    case, symbols = family.SHAPES[name], {"n": ROWS[name]}
    assert family.matches(case, TARGET)
    arrays = random_arrays(case, symbols, seed=len(name))
    result = call(family, case, TARGET, arrays, symbols)
    check(family, case, result, family.reference(case, *arrays))


@pytest.mark.parametrize("name", ["residual_136x640_gelu", "gated_272x328"])
@pytest.mark.parametrize(
    "config",
    [
        {"tile": (64, 64, 2), "split": 2, "share": 2},
        {"tile": (256, 128, 1), "split": 4, "share": 1},
        {"tile": (128, 64, 2), "split": 1, "share": 4},
        {"tile": (128, 128, 1), "split": 2, "share": 1, "dependent_launch": False},
        {"tile": (128, 256, 1), "split": 1, "share": 1},
        {"tile": (128, 16, 2), "split": 6, "share": 1},
        {"tile": (64, 32, 1), "split": 3, "share": 1},
        {"tile": (128, 32, 1), "split": 2, "share": 2},
    ],
)
def test_configurations(name: str, config: dict[str, Any]) -> None:
    case, symbols = family.SHAPES[name], {"n": 150}
    arrays = random_arrays(case, symbols, seed=1)
    result = call(family, case, TARGET, arrays, symbols, config)
    check(family, case, result, family.reference(case, *arrays))


def test_sums_are_sent_where_there_is_room() -> None:
    case = family.SHAPES["o_4096x4096"]
    for tile, split, sent in [((128, 32, 1), 3, True), ((64, 32, 1), 2, True), ((128, 128, 1), 2, False), ((128, 32, 1), 1, False)]:
        text = source(family.build(case, TARGET, {"tile": tile, "split": split, "share": 1, "dependent_launch": True}), TARGET)
        assert ("st_vec_shared__cluster" in text) == sent, (tile, split)


def test_rows_do_not_depend_on_the_batch() -> None:
    case = family.SHAPES["edges_328x392_bias"]
    arrays = random_arrays(case, {"n": 70}, seed=2)
    many = call(family, case, TARGET, arrays, {"n": 70})
    one = call(family, case, TARGET, [arrays[0][66:67], *arrays[1:]], {"n": 1})
    assert np.array_equal(many[66:67].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = family.SHAPES["small_256x576"]
    assert family.matches(case, cuda.parse("cuda:sm_90")) is None
    assert family.matches(replace(case, op="llmc.moe"), TARGET) is None
    assert family.matches(family._call(20, 64), TARGET) is None
    assert family.matches(family._call(40, 64, activation="silu_gated"), TARGET) is None
    assert family.matches(family._call(64, 20), TARGET) is None


def test_pipeline_fits_shared_memory() -> None:
    for outputs, rows, resident in family.space(family.SHAPES["o_4096x4096"], TARGET)["tile"]:
        depth = family.stages(outputs, rows, resident)
        pipeline = depth * ((outputs + rows) * family.K_STEP * 2 + 16)
        assert depth >= 3
        for sides in (1, 2):
            assert 4 * sides * rows * cluster_finish.pitch(outputs // sides) <= pipeline
        assert resident * (pipeline + 1024) <= (228 << 10), (outputs, rows, resident)


def test_a_cluster_has_at_most_eight_blocks_and_each_a_step() -> None:
    case = family.SHAPES["residual_136x640_gelu"]
    for split, share in ((4, 4), (16, 1)):
        config = {"tile": (64, 64, 2), "split": split, "share": share, "dependent_launch": True}
        with pytest.raises(ValueError, match="split over"):
            family.build(case, TARGET, config)


def test_roofline() -> None:
    moved = 2 * (3 * 576 + 256 * 576 + 3 * 256)
    assert family.roofline(family.SHAPES["small_256x576"], n=3) == (moved, 2 * 3 * 256 * 576)
