"""Proposals and the cost model, on spaces whose fastest point is known."""

from __future__ import annotations

import math
import random
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest

from llmc import targets
from llmc.schedules.cpu import linear
from llmc.schedules.parts import kept_under, spaces
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import Record, config_text
from llmc.tune.cost_model import CostModel, features
from llmc.tune.search import enumerate_space, near, numbers, propose

SPACE: dict[str, list[Any]] = {
    "warps": [8, 4, 2, 1, 16], "tile": [(128, 256), (64, 64), (128, 64)], "depth": [4, 2, 8, 16], "early": [True, False],
}  # fmt: skip


def time_of(config: dict[str, Any], call: KernelCall) -> float:
    """Smooth in every axis, with an interaction and a best point that moves with the call's k."""
    k = float(call.args[1].shape[1])
    rows, columns = config["tile"]
    best_warps = math.log2(max(1.0, k / 256))
    return 1e-5 * (
        1.0
        + 0.3 * (math.log2(config["warps"]) - best_warps) ** 2
        + 0.2 * (math.log2(config["depth"] * config["warps"]) - 5) ** 2
        + 0.5 * abs(math.log2(rows * columns) - 13)
        + (0.0 if config["early"] else 0.1)
    )


def record(config: dict[str, Any], call: KernelCall) -> Record:
    return Record("f", call, (("n", 1),), "t", "m", "d", config_text(config), time_of(config, call), 0.0, "", "s", "v")


def test_enumeration_starts_with_the_default_and_has_every_point_once() -> None:
    points = enumerate_space(SPACE, random.Random(0))
    assert points[0] == {axis: values[0] for axis, values in SPACE.items()}
    assert len({config_text(p) for p in points}) == len(points) == 5 * 3 * 4 * 2


@pytest.mark.parametrize("name", ["cpu", "cuda:sm_90a", "cuda:sm_80", "rocm:gfx942", "metal:apple8"])
def test_every_space_can_be_searched(name: str) -> None:
    """A configuration is known by its numbers, whatever the values of its axes are: names, tiles, lists of tiles, parts."""
    target = targets.parse(name)
    for family in targets.module_for(target).families(target):
        call = next((c for c in family.SHAPES.values() if family.matches(c, target)), None)
        for space in [] if call is None else spaces(*kept_under(family, call), target):
            points = enumerate_space(space, random.Random(0))[:200]
            assert len({config_text(dict(numbers(p))) for p in points}) == len(points), (family.NAME, space)
            assert len(propose(points, points[:1], 4, None, random.Random(0))) == min(4, len(points) - 1)


def test_neighbours_are_few_steps_away_and_each_in_a_direction_of_its_own() -> None:
    points = enumerate_space(SPACE, random.Random(0))
    base = next(p for p in points if p == {"warps": 4, "tile": (128, 64), "depth": 4, "early": True})
    chosen = near([p for p in points if p != base], base, [base], 7, random.Random(1))
    ups = {"warps": 8, "depth": 8, "tile": (128, 256)}
    downs = {"warps": 2, "depth": 2, "tile": (64, 64), "early": False}
    for config in chosen:
        moved = {axis: v for axis, v in config.items() if v != base[axis]}
        assert all(v in (ups.get(axis), downs[axis]) for axis, v in moved.items())  # one step
        assert len(moved) == 1 or sorted(v == downs[axis] for axis, v in moved.items()) == [False, True]  # or a trade
    assert len({config_text(c) for c in chosen}) == 7
    directions = [{axis: c[axis] > base[axis] for axis in base if c[axis] != base[axis]} for c in chosen]
    assert all(directions.count(d) == 1 for d in directions)


def test_a_trade_is_no_further_than_a_single_step() -> None:
    space = {"warps": [8, 4, 2], "depth": [2, 1, 4]}
    points = enumerate_space(space, random.Random(0))
    nearest = near(points[1:], points[0], points[:1], 5, random.Random(0))
    single = [{"warps": 4, "depth": 2}, {"warps": 8, "depth": 1}, {"warps": 8, "depth": 4}, {"warps": 4, "depth": 4}]
    assert sorted(map(config_text, nearest[:4])) == sorted(map(config_text, single))
    assert nearest[4] == {"warps": 4, "depth": 1}  # two steps, both down


def test_a_part_has_the_axes_of_its_kernel() -> None:
    kernels = [{"1-8": {"kernel": "gemv", "warps": w, "depth": d}} for w in (8, 4, 2) for d in (1, 2, 4)]
    other = {"1-8": {"kernel": "gemm", "tile": [64, 64]}}
    chosen = near([*kernels[1:], other], kernels[0], [kernels[0]], 2, random.Random(0))
    assert chosen[0]["1-8"] in ({"kernel": "gemv", "warps": 8, "depth": 2}, {"kernel": "gemv", "warps": 4, "depth": 1})
    assert other not in chosen


def test_proposals_are_new_and_end_with_the_space() -> None:
    points = enumerate_space({"a": [1, 2, 3]}, random.Random(0))
    first = propose(points, [], 2, None, random.Random(0))
    rest = propose(points, first, 5, lambda configs: [0.0] * len(configs), random.Random(0))
    assert sorted(c["a"] for c in first + rest) == [1, 2, 3]
    assert propose(points, points, 5, None, random.Random(0)) == []


def search(call: KernelCall, trials: int, seed: int, known: list[Record]) -> float:
    rng, model = random.Random(seed), CostModel(lambda c: SPACE)
    points = enumerate_space(SPACE, rng)
    tried = [points[0]]
    model.fit(known)
    while len(tried) < trials:
        score = (lambda configs: model.score(configs, call)) if model.ready else None
        tried.sort(key=lambda c: time_of(c, call))
        tried += propose(points, tried, min(4, trials - len(tried)), score, rng)
        model.fit([*known, *(record(c, call) for c in tried)])
    return min(time_of(c, call) for c in tried) / min(time_of(c, call) for c in points)


def test_the_cost_model_beats_random_search() -> None:
    call, trials = linear._call(512, 1024), 16
    points = enumerate_space(SPACE, random.Random(0))
    fastest = min(time_of(c, call) for c in points)
    drawn = [min(time_of(c, call) for c in random.Random(s).sample(points, trials)) / fastest for s in range(8)]
    learned = [search(call, trials, s, []) for s in range(8)]
    assert sum(learned) < sum(drawn)
    assert sum(learned) / 8 < 1.15


def test_records_of_other_calls_help() -> None:
    points = enumerate_space(SPACE, random.Random(0))
    others = [linear._call(512, 512), linear._call(512, 2048)]
    known = [record(c, call) for call in others for c in points]
    call = linear._call(512, 1024)
    helped = [search(call, 6, s, known) for s in range(4)]
    alone = [search(call, 6, s, []) for s in range(4)]
    assert sum(helped) < sum(alone)
    assert sum(helped) / 4 < 1.25


def test_failed_candidates_rank_last() -> None:
    call, points = linear._call(512, 1024), enumerate_space(SPACE, random.Random(0))
    known = [record(c, call) for c in points]
    known = [Record(**{**r.__dict__, "seconds": None, "error": "x"}) if '"early":false' in r.config else r for r in known]
    model = CostModel(lambda c: SPACE)
    model.fit(known)
    scores = model.score(points, call)
    fine = [s for s, c in zip(scores, points, strict=True) if c["early"]]
    broken = [s for s, c in zip(scores, points, strict=True) if not c["early"]]
    assert sum(fine) / len(fine) > sum(broken) / len(broken)
    assert max(scores) == max(fine)


def test_features_are_the_same_for_all_of_a_space_and_tell_its_points_apart() -> None:
    found = [features(c, linear._call(8, k)) for c in enumerate_space(SPACE, random.Random(0)) for k in (64, 96)]
    assert len({tuple(sorted(f)) for f in found}) == 1
    assert len({tuple(f.values()) for f in found}) == len(found)


def test_features_of_a_part_are_those_of_its_kernel() -> None:
    call, kernel = linear._call(8, 64), {"warps": 8, "tile": [64, 128]}
    alone, part = features(kernel, call), features({"1-8": {"kernel": "gemv", **kernel}}, call)
    assert {"warps", "tile", "tile1", "tile*", "size0/warps"} <= alone.keys() <= part.keys()
    assert {"is 1-8", "kernel is gemv"} <= part.keys() - alone.keys()
    assert part["tile*"] == pytest.approx(math.log2(65 * 129))


@pytest.mark.parametrize("count", [0, 3])
def test_a_model_without_contrast_is_not_ready(count: int) -> None:
    model = CostModel(lambda c: SPACE)
    model.fit([record(c, linear._call(8, 64)) for c in enumerate_space(SPACE, random.Random(0))[:count]])
    assert not model.ready
