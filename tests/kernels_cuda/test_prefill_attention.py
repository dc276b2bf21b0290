"""``schedules/cuda/prefill_attention.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.cuda import prefill_attention as family
from llmc.schedules.cuda import prefill_tiles
from llmc.targets import cuda
from tests.kernels.harness import paged_arrays
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")
CASES = {
    "small_2x1x128": ([300, 37], [200, 37]),
    "small_3x3x64_f16": ([129], [129]),
    "window_2x1x128": ([513, 90], [40, 1]),
    "softcap_2x2x64": ([65, 1], [65, 1]),
    "softcap_window_1x1x256": ([150], [131]),
    "sinks_4x2x64": ([200, 8, 64], [130, 8, 3]),
    "chunked_2x1x128_f16": ([140, 48], [139, 1]),
    "small_1x1x192": ([1, 200], [1, 70]),
    "group_3_80": ([150, 3, 61], [90, 3, 1]),
    "group_8_96_f16": ([140, 33, 20], [40, 1, 1]),
    "group_7_48_window": ([5, 150], [5, 30]),
}


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    """Fresh prompts, chunks behind a long prefix, and single rows, in one call; pages scattered, foreign ones out of range."""
    case = family.SHAPES[name]
    assert family.matches(case, TARGET)
    lengths, rows = CASES[name]
    arrays, symbols = paged_arrays(case, lengths, rows, seed=len(name))
    result = call(family, case, TARGET, arrays, symbols)
    check(family, case, result, family.reference(case, *arrays))


def test_many_sequences_empty_ones_and_padding() -> None:
    """More than a warp of sequences, some without rows; rows behind the last sequence stay as they were."""
    case = family.SHAPES["softcap_2x2x64"]
    lengths = [3 + i % 7 for i in range(39)] + [140]
    rows = [0 if i % 5 == 0 else 1 + i % 3 for i in range(39)] + [130]
    arrays, symbols = paged_arrays(case, lengths, rows, seed=3)
    used = symbols["n"]
    arrays[0] = np.concatenate([arrays[0], arrays[0][:9]])
    result = call(family, case, TARGET, arrays, {**symbols, "n": used + 9})
    check(family, case, result[:used], family.reference(case, *arrays)[:used])
    assert np.isnan(result[used:].astype(np.float32)).all()


CONFIGS: list[dict[str, Any]] = [
    {"long": [128, 128, 1], "stages": 3, "blocks": 3},
    {"long": [64, 64, 1], "dependent_launch": False, "lazy": "never"},
    {"short": [64, 128, 1], "long": [64, 128, 1], "blocks": 1},
    {"short": [128, 128, 2], "blocks": 2, "turns": False, "lazy": "always"},
    {"short": [128, 64, 2], "long": [128, 64, 2], "lazy": "never", "blocks": 4},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("lengths", "rows"), [([300], [140]), ([300, 90], [300, 90]), ([300, 500], [5, 30])])
def test_configurations(config: dict[str, Any], lengths: list[int], rows: list[int]) -> None:
    case = family.SHAPES["small_2x1x128"]
    arrays, symbols = paged_arrays(case, lengths, rows, seed=1)
    result = call(family, case, TARGET, arrays, symbols, config)
    check(family, case, result, family.reference(case, *arrays))


def test_sums_are_rescaled_when_scores_grow() -> None:
    """Scores that rise by hundreds along a sequence and between neighbouring rows, and fall again."""
    case = family.SHAPES["small_2x1x128"]
    arrays, symbols = paged_arrays(case, [600, 300], [200, 300], seed=4)
    q, pages, *_ = arrays
    q *= np.linspace(1, 40, len(q))[:, None, None].astype(q.dtype)
    pages *= np.geomspace(0.2, 6, pages.size).reshape(pages.shape).astype(pages.dtype)
    for lazy in ("always", "never"):
        result = call(family, case, TARGET, arrays, symbols, {"lazy": lazy, "blocks": 4})
        check(family, case, result, family.reference(case, *arrays))


def test_what_it_does_not_take() -> None:
    case = family.SHAPES["small_2x1x128"]
    assert family.matches(replace(case, phase="decode"), TARGET) is None
    assert family.matches(case, cuda.parse("cuda:sm_90")) is None
    assert family.matches(family._call(2, 1, 72), TARGET) is None
    assert family.matches(family._call(2, 1, 272), TARGET) is None
    assert family.matches(family._call(2, 1, 128, page_size=20), TARGET) is None
    assert family.matches(family._call(2, 1, 128, dtype="float32"), TARGET) is None
    assert family.matches(family._call(2, 1, 128, v_dim=64), TARGET) is None


@pytest.mark.parametrize(("group", "packed"), [(1, 1), (3, 3), (4, 4), (8, 8), (16, 16), (32, 16), (7, 7), (71, 1), (13, 1)])
def test_heads_of_a_tile(group: int, packed: int) -> None:
    assert prefill_tiles.packed_heads(group, 128) == packed


def test_roofline() -> None:
    moved, flops = family.roofline(family.SHAPES["small_2x1x128"], n=4, b=2, context=3)
    assert moved == 2 * (2 * 3 * 2 * 128 + 2 * 4 * 2 * 128)
    assert flops == 4 * 2 * (2 + 3) * 2 * 128
