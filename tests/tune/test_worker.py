"""Candidates that crash, hang, are refused or compute something wrong cost themselves and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from llmc.schedules import lookup as L
from llmc.schedules.cpu import linear, quantized_linear
from llmc.tune import task as T
from llmc.tune.tuner import Budget, State, Tuner
from llmc.tune.worker import CandidateFailed, Worker
from tests.tune.faulty import FAULTS, FAULTY, host

CALL = linear._call(40, 72, bias=1)
CONTROLLED = partial(Worker, module="tests.tune.faulty", build_seconds=8.0)


Q4_K = next(label for label, call in quantized_linear.SHAPES.items() if call.attr("scheme") == "q4_k")


def task() -> T.Task:
    return T.Task(FAULTY, CALL, host(), 3, 1, ({"n": 5}, {"n": 40}), "faulty")


def config(fault: str) -> dict[str, Any]:
    return {"fault": fault, "row_block": task().space["row_block"][0]}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = CONTROLLED(task().setup())
    yield made
    made.close()


def test_a_right_candidate_is_timed_at_every_size(worker: Worker) -> None:
    worker.build(config("none"), "right")
    small, large = worker.time("right")
    assert 0 < small < large


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong", "wrong result: off by"),
        ("refused", "this configuration is refused"),
        ("crash", "ended with status"),
        ("hang", "no answer"),
    ],
)
def test_a_faulty_candidate_fails_and_the_worker_goes_on(worker: Worker, fault: str, message: str) -> None:
    with pytest.raises(CandidateFailed, match=message):
        worker.build(config(fault), fault)
    worker.build(config("fine"), "fine")
    assert all(seconds > 0 for seconds in worker.time("fine"))


def test_a_configuration_outside_the_space_is_refused(worker: Worker) -> None:
    with pytest.raises(CandidateFailed, match="not in the family's space"):
        worker.build({"fault": "none", "row_block": 3}, "outside")


def run(tmp_path: Path, known: L.Records, **options: Any) -> Tuner:
    tuner = Tuner([task()], known, tmp_path / "r.jsonl", options.pop("budget", Budget(100)), worker=CONTROLLED, **options)
    tuner.run()
    return tuner


def test_the_whole_space_is_searched_and_recorded_and_the_winner_is_found_again(tmp_path: Path) -> None:
    tuner = run(tmp_path, L.Records())
    state = tuner.states[0]
    total = len(FAULTS) * 2
    assert (len(state.seconds), len(state.failed), state.trials) == (4, 8, total)
    assert state.gain >= 1.0
    read = L.Records()
    read.read(tmp_path / "r.jsonl")
    assert read.notes == []
    outcomes = {(r.config, r.symbols): r for r in read.entries.values()}
    assert len(outcomes) == total * 2
    for (text, _), record in outcomes.items():
        fault = json.loads(text)["fault"]
        assert (record.seconds is not None) == (fault in ("none", "fine")), (text, record.error)
    assert [f.config for f in tuner.finds()] == ([] if state.taken == state.default else [state.taken])
    assert state.cost(state.taken) < state.cost(state.best) + L.WORTH
    again = run(tmp_path, read, resume=True)
    assert again.states[0].trials == 0


def test_stopping_keeps_what_was_measured(tmp_path: Path) -> None:
    tried: list[int] = []

    def interrupt(states: list[State], what: str) -> None:
        if states[0].trials > 1:
            tried.append(states[0].trials)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, L.Records(), show=interrupt, seed=3)
    read = L.Records()
    read.read(tmp_path / "r.jsonl")
    assert [len({r.config for r in read.entries.values()})] == tried


def test_the_budget_is_kept(tmp_path: Path) -> None:
    tuner = run(tmp_path, L.Records(), budget=Budget(trials=3))
    assert tuner.trials == 3
    assert Budget(seconds=0.0).left(0) == 0


def test_the_next_trials_go_where_the_most_is_to_win() -> None:
    light = State(task(), [], [1e-6, 1e-6], {"a": [4e-6, 4e-6]})
    heavy = State(T.Task(FAULTY, CALL, host(), 0, 1, ({"n": 5},)), [], [1e-6], {"a": [9e-6]})
    assert light.task.weight == 3 * T.TOKENS_PER_PROMPT + 1
    assert light.excess == pytest.approx(3e-6 * light.task.weight)
    assert heavy.excess == pytest.approx(8e-6)


def test_a_worker_goes_on_with_another_call_in_the_same_process(worker: Worker) -> None:
    worker.build(config("none"), "first")
    process = worker._child
    worker.switch(T.Task(linear, linear._call(24, 32), host(), 1, 0, ({"n": 3},)).setup())
    assert not worker.has("first")
    other = {axis: values[0] for axis, values in linear.space(linear._call(24, 32), host()).items()}
    worker.build(other, "other")
    assert len(worker.time("other")) == 1
    assert worker._child is process
    worker.switch(task().setup())
    worker.build(config("fine"), "fine")
    assert len(worker.time("fine")) == 2


@pytest.mark.parametrize("label", ["square_256_int4_g128_bias", "odd_33x70_int8", Q4_K])
def test_quantized_weights_are_packed_and_the_result_is_right(label: str) -> None:
    call = quantized_linear.SHAPES[label]
    made = T.Task(quantized_linear, call, host(), 1, 0, ({"n": 7},))
    with closing(Worker(made.setup())) as started:
        started.build(made.default, "default")
        assert started.time("default")[0] > 0
