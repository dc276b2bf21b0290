"""The search over a model's kernels, each alone: which kernel gets the next trials, and what comes of them.

The next batch of trials goes to the kernel with the most to win: its time now less its roofline, times how often it runs, less and
less as batches bring nothing. A batch is proposed by the cost model, which has learned from every record of the family; it is
built and checked in a worker process, and timed there in rounds, together with the best so far. What was measured is in the
record file before the next batch starts, so that stopping at any moment loses nothing. Compiles use none of it before a model
gained by it (:mod:`llmc.tune.validate`).
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.schedules.lookup import Records, worthwhile
from llmc.schedules.records import Record, append, axes, config_text, machine_class, source_hash
from llmc.tune.cost_model import CostModel
from llmc.tune.limits import Limits, measure
from llmc.tune.offline import spread
from llmc.tune.search import FIRST, Config, enumerate_space, propose
from llmc.tune.task import Task, find, workloads
from llmc.tune.validate import Find
from llmc.tune.worker import CandidateFailed, Worker

BATCH = 4
ROUNDS = 5
FINAL_ROUNDS = 7
LEAST = 0.03
"""Part of its time that a kernel may always win: the roofline is measured, and so never exact."""

PATIENCE = 0.6
"""What a batch that improves nothing leaves of a kernel's claim to more trials."""


@dataclass
class State:
    """Where the search stands with one task. ``seconds``: by configuration, the median time at each size; ``claim``: what is left
    of the task's claim to trials; ``used``: the configuration that compiles use now; ``dropped``: those that no model gained by."""

    task: Task
    candidates: list[Config]
    roofline: list[float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    trials: int = 0
    claim: float = 1.0
    device: str = ""
    used: str = ""
    dropped: frozenset[str] = frozenset()

    @property
    def default(self) -> str:
        return config_text(self.task.default)

    def cost(self, text: str) -> float:
        """Mean of the logarithm of a configuration's time over the sizes."""
        return statistics.mean(map(math.log, self.seconds[text]))

    @property
    def best(self) -> str | None:
        """The fastest configuration; None before anything was measured."""
        return min(self.seconds, key=self.cost, default=None)

    @property
    def taken(self) -> str | None:
        """The configuration to try in a model: the fastest that was not dropped there, or what is used if that is as fast."""
        costs = {text: self.cost(text) for text in self.seconds if text not in self.dropped or text == self.used}
        return worthwhile(costs, self.used or self.default) if costs else None

    @property
    def tried(self) -> list[Config]:
        """The configurations that were tried, the fastest first."""
        done = [c for c in self.candidates if config_text(c) in self.seconds or config_text(c) in self.failed]
        return sorted(done, key=lambda c: self.cost(config_text(c)) if config_text(c) in self.seconds else math.inf)

    @property
    def left(self) -> bool:
        """Whether there is anything to try."""
        return len(self.seconds) + len(self.failed) < len(self.candidates)

    @property
    def gain(self) -> float:
        """How many times as fast what was found is as the default, over all sizes, alone."""
        taken = self.taken
        return math.exp(self.cost(self.default) - self.cost(taken)) if taken and self.default in self.seconds else 1.0

    @property
    def excess(self) -> float:
        """Seconds for a prompt and its answer that the kernel takes above its roofline."""
        best = self.best
        if best is None:
            return math.inf
        now = self.seconds[best][0]
        return max(now - self.roofline[0], LEAST * now) * self.task.weight


@dataclass
class Budget:
    """How much may be tried: ``trials`` configurations, ``seconds`` of time; None is no limit."""

    trials: int | None = None
    seconds: float | None = None
    _start: float = field(default_factory=time.monotonic)

    def left(self, done: int) -> int:
        """Trials that may still be made after ``done``; 0 once the time is over."""
        if self.seconds is not None and time.monotonic() - self._start >= self.seconds:
            return 0
        return 10**9 if self.trials is None else max(0, self.trials - done)


class Tuner:
    """Tunes ``tasks`` and adds what it measures to ``out`` and to ``known``.

    ``resume``: configurations that ``known`` has from this device count as tried. ``show(states, what)``: called after every
    change; ``worker``: makes the process that a task's candidates run in.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        known: Records,
        out: Path,
        budget: Budget,
        *,
        resume: bool = False,
        show: Callable[[list[State], str], None] = lambda states, what: None,
        worker: Callable[[dict[str, Any]], Worker] = Worker,
        seed: int = 0,
    ) -> None:
        self.known, self.out, self.budget, self.resume, self.show = known, out, budget, resume, show
        self.rng, self._new_worker = random.Random(seed), worker
        self.versions = versions()
        limits: Limits = measure(tasks[0].target)
        self.states = [State(t, enumerate_space(t.space, self.rng), [limits.seconds(t, s) for s in t.sizes]) for t in tasks]
        self._worker: tuple[Task, Worker] | None = None
        self._device = ""
        self._start = time.monotonic()
        self._history: list[tuple[float, list[str | None]]] = []

    def run(self) -> None:
        """Search until the budget is spent or every space is exhausted, then time the winners once more.

        Raises KeyboardInterrupt if interrupted, OutputError if records cannot be written; what was measured is written.
        """
        try:
            for state in self.states:  # where every kernel stands, before any gets more
                self._batch(state, self._first(state))
            while (room := self.budget.left(self.trials)) and (promising := self._next()) is not None:
                self._batch(promising, self._propose(promising, min(BATCH, room)))
            for state in self.states:
                if state.trials and state.taken != state.used:
                    self._repeat(state)
        finally:
            self._close()

    @property
    def trials(self) -> int:
        return sum(state.trials for state in self.states)

    def outcome(self) -> list[dict[str, Any]]:
        """What was found, a dictionary for each kernel; ``config`` is what compiles use now."""
        return [
            {
                "kernel": s.task.label,
                "family": s.task.family.NAME,
                "sizes": list(s.task.sizes),
                "config": self._used(s.task),
                "found": None if s.taken is None else json.loads(s.taken),
                "seconds": None if s.taken is None else s.seconds[s.taken],
                "default_seconds": s.seconds.get(s.default),
                "roofline_seconds": s.roofline,
                "gain": s.gain,
                "trials": s.trials,
                "failed": s.failed,
            }
            for s in self.states
        ]

    def curve(self) -> list[tuple[float, float]]:
        """After how many seconds what was found, with today's knowledge of its times, made kernels how many times as fast as with
        what compiles used before: the geometric mean over all of them, each alone."""
        found = []
        for seconds, taken in self._history:
            logs = [0.0] * len(self.states)
            for i, (s, text) in enumerate(zip(self.states, taken, strict=True)):
                if text in s.seconds and s.used in s.seconds:
                    logs[i] = s.cost(s.used) - s.cost(text)
            found.append((seconds, math.exp(statistics.fmean(logs))))
        return found

    def finds(self) -> list[Find]:
        """What is faster than what compiles use now, and no model has turned down."""
        found = []
        for s in self.states:
            if s.taken is not None and s.taken != s.used and s.used in s.seconds:
                task = s.task
                runs = task.per_token + task.per_prefill
                saved = [runs * (a - b) for a, b in zip(s.seconds[s.used], s.seconds[s.taken], strict=True)]
                found.append(find(task, s.taken, tuple(zip(workloads(task), saved, strict=True))))
        return found

    def _next(self) -> State | None:
        open_states = [s for s in self.states if s.left and s.excess * s.claim > 0]
        return max(open_states, key=lambda s: s.excess * s.claim, default=None)

    def _first(self, state: State) -> list[Config]:
        """The default, and what compiling would take from the records there are."""
        state.device = self._device = self._device or self._worker_for(state).device
        if self.resume:
            self._recall(state)
        task = state.task
        used = self._used(task)
        state.used = config_text(used)
        judged = self.known.judged(task.family, task.call, task.target, task.space)
        state.dropped = frozenset(v.config for v in judged if not v.kept and v.device == state.device)
        first = [task.default, used]
        return [c for c in {config_text(c): c for c in first}.values() if config_text(c) not in state.seconds]

    def _used(self, task: Task) -> Config:
        """The configuration that compiles use for the task."""
        found = self.known.lookup(task.family, task.call, task.target)
        return task.default if found is None else {axis: found.config[axis] for axis in task.space}

    def _recall(self, state: State) -> None:
        sizes = [tuple(sorted(s.items())) for s in state.task.sizes]
        table: dict[str, dict[Any, Record]] = {}
        for r in self._records_of(state.task):
            of_task = r.call == state.task.call and axes(r.config) == state.task.space.keys()
            if of_task and r.device == state.device and r.target == state.task.target.name:
                table.setdefault(r.config, {})[r.symbols] = r
        for text, by_size in table.items():
            if any(r.seconds is None for r in by_size.values()):
                state.failed[text] = next(r.error for r in by_size.values() if r.seconds is None)
            elif all(s in by_size for s in sizes):
                state.seconds[text] = [by_size[s].seconds or 0.0 for s in sizes]

    def _records_of(self, task: Task) -> list[Record]:
        return self.known.of_family(task.family, machine_class(task.target))

    def _propose(self, state: State, count: int) -> list[Config]:
        task = state.task
        model = CostModel(lambda call: task.family.space(call, task.target))
        model.fit(self._records_of(task))
        known = model.ready and len(state.tried) >= FIRST
        score = (lambda configs: model.score(configs, task.call)) if known else None
        return propose(state.candidates, state.tried, count, score, self.rng)

    def _worker_for(self, state: State) -> Worker:
        if self._worker is None:
            self._worker = (state.task, self._new_worker(state.task.setup()))
        elif self._worker[0] is not state.task:
            self._worker[1].switch(state.task.setup())
            self._worker = (state.task, self._worker[1])
        return self._worker[1]

    def _close(self) -> None:
        if self._worker is not None:
            self._worker[1].close()
            self._worker = None

    def _batch(self, state: State, configs: Sequence[Config]) -> None:
        """Try configurations, timed beside the best so far."""
        if not configs:
            return
        before = state.best
        old = state.cost(before) if before is not None else math.inf
        state.trials += len(configs)
        rivals = [c for c in state.candidates if config_text(c) == before]
        self._measure(state, [*configs, *rivals], ROUNDS)
        best = state.best
        improved = best is not None and state.cost(best) < old - 0.01
        state.claim = 1.0 if improved else state.claim * PATIENCE
        self._history.append((time.monotonic() - self._start, [s.taken for s in self.states]))
        self.show(self.states, state.task.label)

    def _measure(self, state: State, configs: Sequence[Config], rounds: int) -> None:
        """Build, check and time configurations in rounds, and record the outcome of each."""
        worker = self._worker_for(state)
        alive = {config_text(c): c for c in configs}
        samples: dict[str, list[list[float]]] = {text: [] for text in alive}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for text, config in alive.items():
                if text in failed:
                    continue
                try:
                    if not worker.has(text):
                        worker.build(config, text)
                    samples[text].append(worker.time(text))
                except CandidateFailed as error:
                    failed[text] = str(error)
        for text, reason in failed.items():
            state.failed[text] = reason
            state.seconds.pop(text, None)
        for text in alive:
            if text not in failed:
                state.seconds[text] = [statistics.median(column) for column in zip(*samples[text], strict=True)]
        self._keep(self._outcome(state, text, samples[text], failed.get(text, "")) for text in alive)

    def _outcome(self, state: State, text: str, samples: list[list[float]], error: str) -> list[Record]:
        task = state.task
        columns = [list(column) for column in zip(*samples, strict=True)]
        return [
            Record(
                family=task.family.NAME,
                call=task.call,
                symbols=tuple(sorted(symbols.items())),
                target=task.target.name,
                machine=machine_class(task.target),
                device=state.device,
                config=text,
                seconds=None if error else float(f"{statistics.median(columns[i]):.4g}"),
                spread=0.0 if error else round(spread(columns[i]), 3),
                error=error,
                source=source_hash(task.family, text),
                versions=self.versions,
            )
            for i, symbols in enumerate(task.sizes)
        ]

    def _keep(self, outcomes: Iterable[list[Record]]) -> None:
        found = [r for outcome in outcomes for r in outcome]
        append(self.out, found)
        for r in found:
            self.known.add(r)

    def _repeat(self, state: State) -> None:
        """Time the winner, the runners-up, the default and what is used once more, all in the same rounds."""
        checked: set[str] = set()
        for _ in range(2):
            ranked = sorted(state.seconds, key=state.cost)
            wanted = {*ranked[:3], state.default, state.used} & set(state.seconds)
            if not wanted - checked or wanted <= {state.default, state.used}:
                return
            checked |= wanted
            self._measure(state, [c for c in state.candidates if config_text(c) in checked], FINAL_ROUNDS)
            self.show(self.states, f"{state.task.label}: final")
            if state.best in checked:
                return


def versions() -> str:
    """What measured: ``"llmc 0.1.0, tvm 0.27.0"``."""
    import tvm

    from llmc.version import __version__

    return f"llmc {__version__}, tvm {tvm.__version__}"
