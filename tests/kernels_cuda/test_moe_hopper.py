"""``schedules/cuda/moe_hopper.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.cuda import moe_hopper as family
from llmc.schedules.gpu import moe as portable
from llmc.schedules.protocol import KernelCall
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")


def routed(case: KernelCall, n: int, skewed: bool) -> list[np.ndarray]:
    """Operands with distinct experts for each row; ``skewed``: the same ones for most rows, so that some experts have none."""
    arrays = random_arrays(case, {"n": n}, seed=n)
    rng, (rows, top_k), experts = np.random.default_rng(n), arrays[1].shape, case.args[3].shape[0]
    ids = np.stack([rng.permutation(int(experts))[:top_k] for _ in range(rows)])
    if skewed:
        ids[: rows * 3 // 4] = ids[0]
    arrays[1] = ids.astype(np.int32)
    return arrays


@pytest.mark.parametrize(
    ("name", "n", "skewed"), [("small_136x72", 23, True), ("plain_64x200_f16", 70, False), ("all_72x64_gelu", 3, False)]
)
def test_reference(name: str, n: int, skewed: bool) -> None:
    case = family.SHAPES[name]
    assert family.matches(case, TARGET)
    arrays = routed(case, n, skewed)
    result = call(family, case, TARGET, arrays, {"n": n}, {"tiles": [[128, 16, 2], [128, 64, 2]]})
    check(family, case, result, family.reference(case, *arrays))


def test_rows_do_not_depend_on_the_batch() -> None:
    case, tiles = family.SHAPES["small_136x72"], {"tiles": [[64, 16, 2]]}
    arrays = routed(case, 40, skewed=True)
    many = call(family, case, TARGET, arrays, {"n": 40}, tiles)
    alone = [arrays[0][17:18], arrays[1][17:18], arrays[2][17:18], *arrays[3:]]
    one = call(family, case, TARGET, alone, {"n": 1}, tiles)
    assert np.array_equal(many[17:18].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = family.SHAPES["small_136x72"]
    assert family.matches(case, cuda.parse("cuda:sm_90")) is None
    assert family.matches(replace(case, op="llmc.linear"), TARGET) is None
    for name in ("odd_57_19", "interleaved_bias", "clipped_gate", "plain"):
        assert family.matches(portable.SHAPES[name], TARGET) is None
