"""Families that pick a kernel by their sizes: each part is searched, recorded and looked up alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest

from llmc import targets
from llmc.manifest import KernelChoice
from llmc.passes import choices
from llmc.schedules import lookup as L
from llmc.schedules import parts
from llmc.schedules import records as R
from llmc.schedules.cpu import linear
from llmc.schedules.cuda import decode_attention, linear_hopper, quantized_hopper
from llmc.schedules.protocol import KernelCall
from llmc.tune.cost_model import CostModel
from llmc.tune.task import Task, make, tasks_of, workloads
from llmc.tune.tuner import Budget, Tuner
from llmc.tune.turns import Workload
from tests.support.tuning import verdict

HOPPER = targets.parse("cuda:sm_90a")
CALL = linear_hopper.SHAPES["o_4096x4096"]


def record(config: dict[str, Any], seconds: float, n: int, call: KernelCall = CALL) -> R.Record:
    return R.Record(
        linear_hopper.NAME, parts.kept_under(linear_hopper, call)[1], (("n", n),), HOPPER.name, R.machine_class(HOPPER), "a GPU",
        R.config_text(config), seconds, 0.0, "", R.source_hash(linear_hopper, R.config_text(config)), "llmc test",
    )  # fmt: skip


@pytest.mark.parametrize("family", [linear_hopper, quantized_hopper], ids=lambda f: f.NAME)
def test_parts_are_axes_and_their_sizes_are_theirs(family: Any) -> None:
    for call in family.SHAPES.values():
        space, found = family.space(call, HOPPER), family.parts(call, HOPPER)
        assert found.keys() == family.buckets(call).keys() <= space.keys()
        below = 0
        for axis, most in family.buckets(call).items():
            assert all(below < s["n"] <= (most or 10**6) for s in found[axis])
            below = most or 0


def test_a_part_is_built_as_its_kernel_alone() -> None:
    call = linear_hopper.SHAPES["small_64x64"]
    value = linear_hopper.space(call, HOPPER)["1-8"][0]
    built = parts.build(linear_hopper, call, HOPPER, {"1-8": value})
    whole = linear_hopper.build(call, HOPPER, {axis: v[0] for axis, v in linear_hopper.space(call, HOPPER).items()})
    assert len(built.params) == len(whole.params)
    assert len(built.script()) < len(whole.script()) / 2
    assert parts.built_by(linear_hopper, {"1-8": value}) == parts.built_by(linear_hopper, {"9-16": value}) == value


def test_both_phases_are_tuned_once_and_each_part_is_a_task() -> None:
    def choice(function: str, count: int) -> KernelChoice:
        call = R.call_to_json(dataclasses.replace(CALL, phase=function))
        return KernelChoice(function, CALL.op, "linear_4096x4096", linear_hopper.NAME, count, "", {}, "", "default", call)

    tasks = tasks_of([choice("decode", 3), choice("extend", 5)], HOPPER)
    assert {t.part for t in tasks} == linear_hopper.BUCKETS.keys()
    assert len(tasks) == len(linear_hopper.BUCKETS)
    by_part = {t.part: t for t in tasks}
    assert (by_part["1-8"].per_token, by_part["1-8"].per_prefill) == (3, 0)
    assert (by_part["1025-"].per_token, by_part["1025-"].per_prefill) == (0, 5)
    assert by_part["1-8"].sizes == ({"n": 1}, {"n": 8})
    assert by_part["1-8"].label == "linear_4096x4096 n=1-8"


def test_a_prompt_has_logits_of_its_last_row_alone() -> None:
    def choice(function: str, o: int) -> KernelChoice:
        call = dataclasses.replace(linear._call(o, 64), phase=function)
        return KernelChoice(function, call.op, f"linear_{o}", linear.NAME, 1, "", {}, "", "default", R.call_to_json(call))

    host = targets.parse("cpu")
    tasks = {t.label: t for t in tasks_of([choice(f, o) for f in ("decode", "extend") for o in (48, 256)], host)}
    assert {label: t.sizes for label, t in tasks.items()} == {
        "linear_48 decode": ({"n": 1}, {"n": 8}),
        "linear_256 decode": ({"n": 1}, {"n": 8}),
        "linear_48 extend": ({"n": 512},),
        "linear_256 extend": ({"n": 1},),
    }
    assert workloads(tasks["linear_256 extend"]) == workloads(tasks["linear_48 extend"]) == [Workload("prefill", 512)]


@pytest.mark.parametrize("phase", ["decode", "extend"])
def test_lookup_puts_the_parts_together_and_keeps_defaults_elsewhere(phase: str) -> None:
    space = linear_hopper.space(CALL, HOPPER)
    records = L.Records()
    for axis, n in (("1-8", 8), ("129-256", 256)):
        for i, value in enumerate(space[axis]):
            records.add(record({axis: value}, 1e-5 * (1 + abs(i - 1)), n))
        records.add(verdict(record({axis: space[axis][1]}, 1e-5, n)))
    found = records.lookup(linear_hopper, dataclasses.replace(CALL, phase=phase), HOPPER)
    assert found is not None
    assert found.origin == "record"
    assert found.config == {axis: values[axis in ("1-8", "129-256")] for axis, values in space.items()}
    near = linear_hopper.linear_call.sample(4096, 4352, residual=1)
    other = records.lookup(linear_hopper, near, HOPPER)
    assert other is not None
    assert other.origin == "nearest"
    assert "129-256: nearest, from records of the nearest call" in other.why


def test_records_of_a_part_outlive_changes_of_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    values = linear_hopper.space(CALL, HOPPER)["17-32"]
    by_kernel = {kernel: next(v for v in values if v["kernel"] == kernel) for kernel in ("gemm_split", "gemv")}
    records = L.Records()
    for i, value in enumerate(by_kernel.values()):
        records.add(record({"17-32": value}, 1e-5 / (1 + i), 32))
        records.add(verdict(record({"17-32": value}, 1e-5, 32)))
    found = records.lookup(linear_hopper, CALL, HOPPER)
    assert found is not None
    assert found.config["17-32"] == by_kernel["gemv"]
    hashed = R._code_hash
    monkeypatch.setattr(R, "_code_hash", lambda path: "changed" if path.endswith("/gemv.py") else hashed(path))
    after = records.supposing(())
    found = after.lookup(linear_hopper, CALL, HOPPER)
    assert found is not None
    assert found.config["17-32"] == by_kernel["gemm_split"]
    assert ["2 tuning records of cuda.linear_hopper are ignored" in note for note in after.notes] == [True]


def test_a_record_of_a_kernel_that_is_no_more_is_stale() -> None:
    records = L.Records()
    records.add(
        dataclasses.replace(record({"1-8": linear_hopper.space(CALL, HOPPER)["1-8"][0]}, 1.0, 1), config='{"1-8":{"kernel":"x"}}')
    )
    records.add(dataclasses.replace(record({"1-8": {"kernel": "gemv"}}, 1.0, 1), config='{"1-8":8,"dependent_launch":true}'))
    assert records.lookup(linear_hopper, CALL, HOPPER) is None
    assert "2 tuning records of cuda.linear_hopper are ignored" in records.notes[0]


@pytest.mark.parametrize("rows", ["9-16", "17-32"])
def test_where_kernels_take_over_from_each_other_both_are_tried(rows: str) -> None:
    """So the boundary between a matrix times a few vectors and a product of matrices is found, not set."""
    quantized = quantized_hopper.SHAPES["o_4096x4096_int4_g128"]
    kernels = {v["kernel"] for v in linear_hopper.candidates(CALL, rows)}
    assert {"gemv", "gemm_split"} <= kernels
    assert {v["kernel"] for v in quantized_hopper.candidates(quantized, rows)} == {"gemv", "gemm"}


def test_how_a_sequence_is_split_is_searched_at_several_batches_and_contexts() -> None:
    """A configuration of decode attention says how many blocks share a sequence by the batch and the context, in host code."""
    call = dataclasses.replace(decode_attention._call(32, 8, 128), phase="decode")
    (task,) = make(decode_attention, call, HOPPER, 1, 0)
    assert all(len(task.space[axis]) > 1 for axis in ("split", "fill", "least", "many"))
    sizes = {(s["b"], s["context"]) for s in task.sizes}
    assert sizes == {(1, 1024), (8, 1024), (1, 8192), (64, 1024)}
    assert workloads(task)[2] == Workload("decode", 1, 8192)


def test_what_is_chosen_for_a_whole_model() -> None:
    model, host = choices.model_call(64, 256, 2, "float32"), targets.parse("cpu")
    chosen = {t.kind: {axis for axis, values in choices.space(model, t).items() if len(values) > 1} for t in (HOPPER, host)}
    assert {"page_size", "gated", "append", "norm", "early"} <= chosen["cuda"]
    assert chosen["cpu"] == {"page_size", "gated", "append", "step", "chunks"}


def test_the_cost_model_ranks_one_part_from_another() -> None:
    """What warps do for up to 8 rows is believed of 16 until something else is seen."""
    model = CostModel(lambda call: linear_hopper.space(call, HOPPER))
    calls = [linear_hopper.linear_call.sample(o, 4096) for o in (2048, 4096, 8192)]
    model.fit([record({"1-8": v}, 1e-5 * v["depth"], 8, c) for c in calls for v in gemvs(c, "1-8")])
    assert model.ready
    asked = gemvs(CALL, "9-16")
    scores, depths = model.score([{"9-16": v} for v in asked], CALL), [v["depth"] for v in asked]
    assert depths[scores.index(max(scores))] == min(depths)
    assert max(s for s, d in zip(scores, depths, strict=True) if d == max(depths)) < sorted(scores)[len(scores) // 2]


def gemvs(call: KernelCall, part: str) -> list[dict[str, Any]]:
    return [v for v in linear_hopper.space(call, HOPPER)[part] if v["kernel"] == "gemv"]


class _FakeWorker:
    """Times every candidate as its place in the part's axis says; the second is the fastest."""

    device = "a GPU"

    def __init__(self, setup: dict[str, Any]) -> None:
        self.switch(setup)

    def switch(self, setup: dict[str, Any]) -> None:
        self.space, self.part, self.sizes = linear_hopper.space(CALL, HOPPER), setup["part"], setup["sizes"]
        self.built: dict[str, int] = {}

    def build(self, config: dict[str, Any], text: str) -> None:
        assert config.keys() == {self.part}
        self.built[text] = self.space[self.part].index(config[self.part])

    def has(self, text: str) -> bool:
        return text in self.built

    def time(self, text: str) -> list[float]:
        return [1e-5 * (1 + abs(self.built[text] - 1)) for _ in self.sizes]

    def close(self) -> None:
        pass


def test_tuner_finds_the_best_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.tune import tuner as module
    from llmc.tune.limits import Limits

    monkeypatch.setattr(module, "measure", lambda target: Limits(1e12, 1e15))
    tasks: list[Task] = [t for t in make(linear_hopper, CALL, HOPPER, 1, 1) if t.part in ("1-8", "129-256")]
    known = L.Records()
    tuner = Tuner(tasks, known, tmp_path / "r.jsonl", Budget(400), worker=_FakeWorker)  # type: ignore[arg-type]
    tuner.run()
    space = linear_hopper.space(CALL, HOPPER)
    finds = {f.rows: f for f in tuner.finds()}
    assert {rows: f.config for rows, f in finds.items()} == {
        rows: R.config_text({rows: space[rows][1]}) for rows in ("1-8", "129-256")
    }
    assert [str(test) for test, _ in finds["1-8"].saves] == ["1 sequence", "8 sequences"]
    assert [str(test) for test, _ in finds["129-256"].saves] == ["prompt of 256"]
    assert all(seconds > 0 for f in finds.values() for _, seconds in f.saves)
    curve = tuner.curve()
    assert [gain for _, gain in curve] == sorted(gain for _, gain in curve)
    assert curve[0][1] == 1.0
    assert curve[-1][1] == pytest.approx(2.0)
    again = Tuner(tasks, known, tmp_path / "r.jsonl", Budget(400), worker=_FakeWorker, resume=True)  # type: ignore[arg-type]
    again.run()
    assert again.trials == 0
