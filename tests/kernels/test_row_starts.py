"""``schedules/cpu/row_starts.py`` on this processor and ``schedules/gpu/row_starts.py`` on emulated GPUs."""

from __future__ import annotations

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.cpu import row_starts as cpu
from llmc.schedules.gpu import row_starts as gpu
from tests.kernels.harness import build, tensor
from tests.support.cuda_emulator import run

CALL = cpu.SHAPES["any"]
CASES = {
    "one": ([4], [0, 5], [0, 1]),
    "several": ([2, 3, 5, 6, 7], [0, 4, 4, 5, 8], [0, 2, 2, 2, 5]),
    "a_chunk_without_logits": ([7], [0, 3, 8], [0, 0, 1]),
    "all": (list(range(300)), [0, 290, 300], [0, 290, 300]),
}
"""Rows with logits; where sequences begin among all rows; and among those with logits."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spec", ["cpu", "cuda:sm_90a", "metal:apple7"])
def test_rows_before_each_sequence(spec: str, case: str) -> None:
    rows, starts, expected = CASES[case]
    arrays = [np.array(rows, np.int32), np.array(starts, np.int32), np.ones(len(starts) - 1, np.int32)]
    family, target, b = cpu if spec == "cpu" else gpu, targets.parse(spec), len(starts) - 1
    assert family.matches(CALL, target)
    np.testing.assert_array_equal(family.reference(CALL, *arrays), expected)
    if spec == "cpu":
        out = tensor(np.full(b + 1, -1, np.int32))
        build({"starts": (family, CALL)}, target)["starts"](*map(tensor, arrays), out)
        found = out.numpy()
    else:
        found = run(family.build(CALL, target, {}), target, *arrays, np.full(b + 1, -1, np.int32))[-1]
    np.testing.assert_array_equal(found, expected)
