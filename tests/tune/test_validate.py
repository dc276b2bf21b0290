"""What is faster alone is kept if a model gains by it: finds of invented kernels, a model whose speed is a formula."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest

from llmc import targets
from llmc.errors import LlmcError, OutputError
from llmc.schedules import lookup as L
from llmc.schedules import records as R
from llmc.schedules.cpu import attend, linear
from llmc.tune import offline_model, pack_model
from llmc.tune.compare import Comparison, Site, compare, summary
from llmc.tune.task import Task
from llmc.tune.task import find as task_find
from llmc.tune.turns import RunFailed, Workload
from llmc.tune.validate import Find, Validation

HOST = targets.parse("cpu")
SHAPES = ((48, 64), (64, 64), (64, 128), (128, 64), (256, 64))
ONE, EIGHT, PROMPT = Workload("decode", 1), Workload("decode", 8), Workload("prefill", 512)
FAMILIES = {family.NAME: family for family in (linear, attend)}
STEP = 1.0
"""Seconds of everything a model does with defaults."""


def find(shape: tuple[int, int], phase: str = "decode", saves: float = 0.02, family: Any = linear) -> Find:
    call = linear._call(*shape) if family is linear else attend._call(4, 2, 16, page_size=8)
    call = dataclasses.replace(call, phase=phase)
    space = family.space(call, HOST)
    config = R.config_text({axis: values[-1] for axis, values in space.items()})
    kinds = (ONE, EIGHT) if phase == "decode" else (PROMPT,)
    task = Task(family, call, HOST, 1, 0, (), f"{family.NAME} {shape}")
    return task_find(task, config, tuple((workload, saves) for workload in kinds))


class Machine:
    """Compiles a model to a file with the finds that it is made of, and takes for a step what each of them saves."""

    def __init__(self, finds: Sequence[Find], saved: Callable[[Find, Workload], float], jitter: float = 0.0) -> None:
        self.finds, self.saved, self.jitter = finds, saved, jitter
        self.builds: list[list[int]] = []
        self.runs = 0
        self.broken: set[int] = set()

    def build(self, finds: frozenset[Find], folder: Path) -> None:
        taken = [i for i, f in enumerate(self.finds) if f in finds]
        self.builds.append(taken)
        folder.mkdir(parents=True)
        (folder / "finds.json").write_text(json.dumps(taken))

    def open(self, base: Path, rival: Path, tests: Sequence[Workload]) -> None:
        self.pair = [json.loads((folder / "finds.json").read_text()) for folder in (base, rival)]
        if self.broken & {i for taken in self.pair for i in taken}:
            raise RunFailed("it crashed")

    def pairs(self, test: Workload, rounds: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(rounds):
            self.runs += 1
            noise = 1 + self.jitter * ((self.runs * 7919) % 13 - 6) / 6
            base, rival = (STEP - sum(self.saved(self.finds[i], test) for i in taken) for taken in self.pair)
            found.append((base * noise, rival / noise))
        return found

    def close(self) -> None:
        pass


def _taken(records: L.Records, f: Find) -> bool:
    found = records.lookup(FAMILIES[f.family], f.call, HOST)
    return found is not None and R.config_text(found.config) == f.config


def validate(tmp_path: Path, machine: Machine, known: L.Records | None = None, **site: Any) -> Validation:
    records = L.Records() if known is None else known
    place = Site("a model", machine, records, tmp_path / "r.jsonl", tmp_path / "models", "a machine", "test", **site)
    found = Validation(place, machine.build, 8)
    found.run(machine.finds)
    return found


def shapes_used(tmp_path: Path, finds: Sequence[Find]) -> set[str]:
    """What a later compile takes, from the file alone."""
    records = L.load([tmp_path])
    assert records.notes == []
    return {f.label for f in finds if _taken(records, f)}


def test_what_is_faster_alone_and_slower_in_the_model_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    finds = [find(shape) for shape in SHAPES]
    loser = finds[3]
    machine = Machine(finds, lambda f, test: -0.15 if f is loser else 0.02)
    found = validate(tmp_path, machine)
    assert shapes_used(tmp_path, finds) == {f.label for f in finds if f is not loser}
    assert machine.builds[0] == []
    assert machine.builds[1] == [0, 1, 2, 3, 4]
    assert found.final["decode"].gain == pytest.approx(1 / (1 - 4 * 0.02), rel=1e-3)
    used = L.load([tmp_path]).lookup(linear, loser.call, HOST)
    assert used is None  # nothing was measured alone here: the kernel's default


def test_a_loser_among_many_winners_is_found_by_what_the_kernels_promise(tmp_path: Path) -> None:
    finds = [find(shape) for shape in SHAPES]
    machine = Machine(finds, lambda f, test: -0.05 if f is finds[0] else 0.02)
    validate(tmp_path, machine)
    assert shapes_used(tmp_path, finds) == {f.label for f in finds[1:]}


def test_all_are_kept_after_one_comparison_if_the_model_gains_as_promised(tmp_path: Path) -> None:
    finds = [find(shape) for shape in SHAPES]
    machine = Machine(finds, lambda f, test: 0.018)
    found = validate(tmp_path, machine)
    assert machine.builds == [[], [0, 1, 2, 3, 4]]
    assert [len(group.kept) for group in found.groups] == [5]


def test_ranges_of_rows_decide_by_themselves_with_the_same_artifacts(tmp_path: Path) -> None:
    finds = [find(shape, phase) for shape in SHAPES[:2] for phase in ("decode", "extend")]
    machine = Machine(finds, lambda f, test: {"decode": 0.02, "extend": -0.02}[f.rows] * (test.kind == f.saves[0][0].kind))
    validate(tmp_path, machine)
    used = {f.label + f.rows for f in finds if _taken(L.load([tmp_path]), f)}
    assert used == {f.label + "decode" for f in finds}
    assert machine.builds[:2] == [[], [0, 1, 2, 3]]


def test_slower_at_one_batch_is_not_kept(tmp_path: Path) -> None:
    finds = [find(SHAPES[0])]
    validate(tmp_path, Machine(finds, lambda f, test: 0.05 if test == ONE else -0.01))
    assert shapes_used(tmp_path, finds) == set()


def test_a_family_is_tried_on_top_of_what_was_kept_of_the_one_before(tmp_path: Path) -> None:
    finds = [find(SHAPES[0]), find((0, 0), family=attend)]
    machine = Machine(finds, lambda f, test: 0.02)
    found = validate(tmp_path, machine)
    assert machine.builds == [[], [0], [0, 1]]
    assert found.final["decode"].gain == pytest.approx(1 / 0.96, rel=1e-3)


def test_together_they_may_lose_what_each_gains(tmp_path: Path) -> None:
    """Halves of a family that gain and lose as one: the last run decides."""
    finds = [find(SHAPES[0]), find((0, 0), family=attend)]

    class Thrashing(Machine):
        def pairs(self, test: Workload, rounds: int) -> list[tuple[float, float]]:
            base, rival = ({0: 1.0, 1: 0.97, 2: 0.94}[len(taken)] for taken in self.pair)
            return [(base, 1.1 if len(self.pair[1]) - len(self.pair[0]) == 2 else rival)] * rounds

    validate(tmp_path, Thrashing(finds, lambda f, test: 0.0))
    assert shapes_used(tmp_path, finds) == set()


def test_noise_is_no_gain(tmp_path: Path) -> None:
    finds = [find(SHAPES[0])]
    validate(tmp_path, Machine(finds, lambda f, test: 0.002, jitter=0.05))
    assert shapes_used(tmp_path, finds) == set()


def test_what_crashes_is_dropped_and_a_model_that_does_not_run_at_all_is_an_error(tmp_path: Path) -> None:
    finds = [find(shape) for shape in SHAPES[:2]]
    machine = Machine(finds, lambda f, test: 0.02)
    machine.broken = {1}
    validate(tmp_path / "a", machine)
    assert shapes_used(tmp_path / "a", finds) == {finds[0].label}

    class Dead(Machine):
        def open(self, base: Path, rival: Path, tests: Sequence[Workload]) -> None:
            raise RunFailed("no such instruction")

    with pytest.raises(LlmcError, match="as it is compiled now it does not run: no such instruction"):
        validate(tmp_path / "b", Dead(finds, lambda f, test: 0.02))


def test_a_full_disk_is_no_verdict(tmp_path: Path) -> None:
    class Full(Machine):
        def build(self, finds: frozenset[Find], folder: Path) -> None:
            if finds:
                raise OutputError("no room")
            super().build(finds, folder)

    with pytest.raises(OutputError, match="no room"):
        validate(tmp_path, Full([find(SHAPES[0])], lambda f, test: 0.02))
    assert L.load([tmp_path]).verdicts == {}


def test_stopping_keeps_what_was_validated(tmp_path: Path) -> None:
    finds = [find(SHAPES[0]), find((0, 0), family=attend)]
    machine = Machine(finds, lambda f, test: 0.02)

    def stop(line: str) -> None:
        if "attend" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(tmp_path, machine, say=stop)
    assert shapes_used(tmp_path, finds) == {finds[0].label}


def test_nothing_is_run_once_the_time_is_up(tmp_path: Path) -> None:
    machine = Machine([find(SHAPES[0])], lambda f, test: 0.02)
    validate(tmp_path, machine, over=lambda: True)
    assert machine.builds == []


def test_a_ratio_is_that_of_the_pairs_and_not_of_the_moments_they_ran_in(tmp_path: Path) -> None:
    pairs = [(speed * 1.03, speed) for speed in (1.0, 4.0, 1.1, 0.7, 2.0, 1.5, 1.0, 9.0)]
    found = summary(pairs)
    assert math.exp(found.log) == pytest.approx(1.03)
    assert found.error < 1e-9
    disturbed = summary([*pairs[:-1], (9.0, 1.0)])
    assert math.exp(disturbed.log) == pytest.approx(1.03)


def test_tests_that_count_together_are_weighted_by_their_time() -> None:
    ratios = {ONE: summary([(0.01, 0.008)] * 8), PROMPT: summary([(1.0, 1.1)] * 8)}
    together = Comparison(ratios, {ONE: 900, PROMPT: 1})
    apart = Comparison(ratios)
    assert together.wins
    assert not apart.wins
    assert apart.loses
    assert together.log == pytest.approx(0.9 * math.log(1.25) - 0.1 * math.log(1.1))


def test_more_rounds_are_run_until_it_is_certain(tmp_path: Path) -> None:
    finds = [find(SHAPES[0])]
    counts = []
    for jitter in (0.0, 0.05):
        machine = Machine(finds, lambda f, test: 0.01, jitter)
        for taken, name in (([], "base"), ([0], "rival")):
            (tmp_path / f"{name}{jitter}").mkdir()
            (tmp_path / f"{name}{jitter}" / "finds.json").write_text(json.dumps(taken))
        compare(machine, tmp_path / f"base{jitter}", tmp_path / f"rival{jitter}", [ONE])
        counts.append(machine.runs)
    assert counts[0] < counts[1]


def test_artifacts_to_carry_have_every_set_of_a_range_untouched_by_others() -> None:
    """Two finds of a range, one of another, one of a whole phase, which touches both."""
    two = [dataclasses.replace(find(shape), rows="1-8") for shape in SHAPES[:2]]
    finds = [*two, dataclasses.replace(find(SHAPES[0]), rows="9-16"), find(SHAPES[2])]
    packed = offline_model.Packed("a model", "cpu", 8, "test", finds, pack_model.sets_of(finds))
    assert packed.artifacts == [[], [0, 2], [1], [0, 1], [3]]
    for rows, numbers in (("1-8", (0, 1)), ("9-16", (2,)), ("decode", (3,))):
        prepared = offline_model._Prepared(Path(), packed, rows)
        for count in range(len(numbers) + 1):
            for taken in itertools.combinations(numbers, count):
                wanted = {finds[i] for i in taken}
                assert any(prepared._tested([finds[j] for j in artifact]) == wanted for artifact in packed.artifacts)
    alone = offline_model._Prepared(Path(), packed, "decode")
    assert alone._tested(finds) is None
