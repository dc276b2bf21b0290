"""``llmc tune`` from beginning to end: the kernels alone, what was found of them in the model, the choices for the whole model.

Whatever ends it, what models gained by until then is in the records, and compiles use it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.progress import Progress
from llmc.schedules.lookup import Records
from llmc.tune import whole
from llmc.tune.compare import Runner, Site
from llmc.tune.devices import device_name
from llmc.tune.display import Show
from llmc.tune.subject import Subject
from llmc.tune.task import Task
from llmc.tune.tuner import Budget, Tuner, versions
from llmc.tune.validate import Build, Find, Validation

TRIALS = 64
"""Configurations of a kernel that are tried unless the user says otherwise."""

SEARCH = 0.45
"""Part of the time that kernels are searched alone; the rest is for what was found of them."""


@dataclass
class Plan:
    """What is to be done. ``trials``: configurations to try, None for :data:`TRIALS` of each kernel, or without a limit if there is
    one in ``seconds``, the time for everything; ``resume``: count what records have as tried; ``choices``: go on with those for
    the whole model."""

    tasks: list[Task]
    trials: int | None = None
    seconds: float | None = None
    resume: bool = False
    choices: bool = True
    _start: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._start

    def over(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and self.elapsed() >= self.seconds

    def budget(self) -> Budget:
        """For the search of kernels alone."""
        trials = TRIALS * len(self.tasks) if self.trials is None and self.seconds is None else self.trials
        return Budget(trials, None if self.seconds is None else SEARCH * self.seconds)


class Session:
    """One run of ``llmc tune``."""

    def __init__(
        self, subject: Subject, plan: Plan, known: Records, out: Path, progress: Progress, runner: Callable[[], Runner]
    ) -> None:
        """``known``: the records there are; ``out``: the file for new ones; ``runner``: makes what runs models in turns."""
        self.subject, self.plan, self.known, self.out, self.progress = subject, plan, known, out, progress
        self._make_runner = runner
        self.tuner: Tuner | None = None
        self.validation: Validation | None = None
        self.outcome: whole.Outcome | None = None
        self.interrupted = False

    def run(self, show: Callable[[], Any]) -> None:
        """Do all of it. ``show()``: a context manager with what draws the search (:func:`llmc.tune.display.on_stderr`). An
        interrupt ends it, and :attr:`interrupted` says so."""
        try:
            if self.plan.tasks:
                self._search(show)
            runner = self._make_runner()
            try:
                self._in_model(runner)
            finally:
                runner.close()
        except KeyboardInterrupt:
            self.interrupted = True

    def _search(self, show: Callable[[], Any]) -> None:
        with self.progress.phase("machine limits"):
            self.tuner = Tuner(self.plan.tasks, self.known, self.out, self.plan.budget(), resume=self.plan.resume)
        draw: Show
        with show() as draw:
            self.tuner.show = draw
            self.tuner.run()

    def _in_model(self, runner: Runner) -> None:
        subject = self.subject
        site = Site(
            subject.name,
            runner,
            self.known,
            self.out,
            subject.folder,
            device_name(subject.target.kind),
            versions(),
            self.progress.note,
            self.plan.over,
        )
        if self.tuner is not None and (finds := self.tuner.finds()):
            with self.progress.phase(f"{len(finds)} finds in the model"):
                self.validation = Validation(site, self._supposing(site), subject.limits.max_batch)
                self.validation.run(finds)
        if self.plan.choices and not self.plan.over():
            with self.progress.phase("choices for the whole model"):
                build = lambda choices, folder: subject.build(self.known, folder, choices)  # noqa: E731
                self.outcome = whole.Search(site, subject.call, subject.target, build).run()

    def _supposing(self, site: Site) -> Build:
        """Compiles the model with the records as they are now and finds that are taken for kept."""
        before = self.known.supposing(())

        def build(finds: frozenset[Find], folder: Path) -> None:
            supposed = [find.verdict(True, 1.0, site.model, site.device, site.versions) for find in finds]
            self.subject.build(before.supposing(supposed), folder)

        return build

    def summary(self) -> list[str]:
        """What compiles gain by, a line each."""
        lines = []
        if left := self._undecided():
            lines.append(f"not tried in the model yet, go on with --resume: {', '.join(left)}")
        if self.validation is not None:
            kept = sum(len(group.kept) for group in self.validation.groups)
            lines.append(f"{kept} of {sum(len(g.tried) for g in self.validation.groups)} finds kept: the model gains by them")
            lines += [f"  {rows}: {comparison}" for rows, comparison in self.validation.final.items()]
        if self.outcome is not None:
            lines.append(f"choices for the whole model: {json.dumps(self.outcome.best)}")
        return lines

    def _undecided(self) -> list[str]:
        """The finds that the model had no time for."""
        decided = set() if self.validation is None else {find for group in self.validation.groups for find in group.tried}
        return [] if self.tuner is None else [find.label for find in self.tuner.finds() if find not in decided]

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON holds it."""
        validation = self.validation
        return {
            "records": str(self.out),
            "interrupted": self.interrupted,
            "seconds": self.plan.elapsed(),
            "kernels": [] if self.tuner is None else self.tuner.outcome(),
            "curve": [] if self.tuner is None else self.tuner.curve(),
            "decisions": [] if validation is None else [group.to_json() for group in validation.groups],
            "model": {} if validation is None else {rows: c.to_json() for rows, c in validation.final.items()},
            "choices": None if self.outcome is None else whole.to_json(self.outcome),
        }
