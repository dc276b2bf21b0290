"""``llmc tune`` as a whole: what an interrupt leaves, and how the time is shared out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest

from llmc import targets
from llmc.manifest import Limits
from llmc.passes import choices as family
from llmc.progress import SilentProgress
from llmc.schedules import lookup as L
from llmc.tune.session import SEARCH, Plan, Session
from llmc.tune.turns import Workload

HOST = targets.parse("cpu")


class _Model:
    """Compiles its choices to a file that holds them."""

    name, target, limits, call = "a model", HOST, Limits(8, 512, 128), family.model_call(64, 256, 2, "float32")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self, records: L.Records, folder: Path, choices: family.Choices | None = None) -> None:
        folder.mkdir(parents=True)
        (folder / "choices.json").write_text(json.dumps(dataclasses.asdict(choices or family.DEFAULT)))


class _Runner:
    """Pages of 32 are faster. The user presses Ctrl-C when ``last`` is tried."""

    def __init__(self, last: str) -> None:
        self.last, self.closed = last, False

    def open(self, base: Path, rival: Path, tests: Sequence[Workload]) -> None:
        self.pair = [json.loads((folder / "choices.json").read_text()) for folder in (base, rival)]

    def pairs(self, test: Workload, rounds: int) -> list[tuple[float, float]]:
        if not self.pair[1].get(self.last, True):
            raise KeyboardInterrupt
        base, rival = (0.9 if c["page_size"] == 32 else 1.0 for c in self.pair)
        return [(base, rival)] * rounds

    def close(self) -> None:
        self.closed = True


def session(tmp_path: Path, runner: _Runner, known: L.Records, plan: Plan) -> Session:
    subject: Any = _Model(tmp_path / f"models{len(list(tmp_path.iterdir()))}")
    made = Session(subject, plan, known, tmp_path / "records.jsonl", SilentProgress(), lambda: runner)
    made.run(lambda: nullcontext())
    return made


def test_an_interrupt_keeps_what_the_model_has_gained_by(tmp_path: Path) -> None:
    runner = _Runner(last="append")
    found = session(tmp_path, runner, L.Records(), Plan([]))
    assert found.interrupted
    assert runner.closed
    records = L.load([tmp_path])
    assert family.find(records, _Model.call, HOST)[0].page_size == 32
    tried = len(records.verdicts)
    runner = _Runner(last="nothing")
    again = session(tmp_path, runner, records, Plan([]))
    assert not again.interrupted
    assert again.outcome is not None
    assert again.outcome.best["page_size"] == 32
    assert {json.loads(text)["page_size"] for text in again.outcome.tried} <= {16, 32, 64}
    assert len(L.load([tmp_path]).verdicts) > tried


def test_time_is_for_all_of_it(tmp_path: Path) -> None:
    plan = Plan([], seconds=100.0)
    assert plan.budget().seconds == SEARCH * 100.0
    assert plan.budget().trials is None
    assert not plan.over()
    over = Plan([], seconds=0.0)
    assert over.over()
    found = session(tmp_path, _Runner(last="nothing"), L.Records(), over)
    assert found.outcome is None
    assert found.to_json()["choices"] is None


@pytest.mark.parametrize(("trials", "tasks", "wanted"), [(None, 2, 128), (0, 2, 0), (5, 2, 5)])
def test_trials_without_a_time(trials: int | None, tasks: int, wanted: int) -> None:
    placeholders: list[Any] = [None] * tasks
    assert Plan(placeholders, trials).budget().left(0) == wanted
