"""Whether one artifact is faster than another: ratios of runs in turns, until they are certain or it is not worth more."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import LlmcError
from llmc.schedules.lookup import Records
from llmc.schedules.records import Record, Verdict, append
from llmc.tune.turns import RunFailed, Workload

ROUNDS, MOST = 8, 40
"""Pairs of runs that are made at once, and in all."""

LEAST = 0.002
"""Part of the time below which a difference is none: other code in other places moves that much."""

CERTAIN = 2.5
"""Standard errors that a difference must be."""

FINE = 0.0015
"""Standard error that nobody wants smaller."""


class Runner(Protocol):
    """Runs artifacts in turns, as :class:`llmc.tune.turns.Turns` does."""

    def open(self, base: Path, rival: Path, tests: Sequence[Workload]) -> None: ...

    def pairs(self, test: Workload, rounds: int) -> list[tuple[float, float]]: ...

    def close(self) -> None: ...


@dataclass
class Site:
    """Where a model's artifacts are compared, and where what comes of it goes: ``known`` and the file ``out`` get the records,
    ``folder`` the artifacts. ``device``, ``versions``: what measures; ``over()``: whether the time is up."""

    model: str
    runner: Runner
    known: Records
    out: Path
    folder: Path
    device: str
    versions: str
    say: Callable[[str], None] = lambda line: None
    over: Callable[[], bool] = lambda: False

    def write(self, lines: Sequence[Record | Verdict]) -> None:
        """Keep records and verdicts. Raises OutputError if they cannot be written."""
        append(self.out, lines)
        for line in lines:
            self.known.add(line)


@dataclass(frozen=True)
class Ratio:
    """Logarithm of the time of the base over that of the rival: median of the pairs, its standard error; ``seconds`` of the base
    and of the rival, medians."""

    log: float
    error: float
    seconds: tuple[float, float]

    @property
    def certain(self) -> float:
        """What it must be beyond to count."""
        return max(CERTAIN * self.error, LEAST)


@dataclass(frozen=True)
class Comparison:
    """How a rival did against its base. ``ratios`` by test; ``runs``: how often each is run where their time counts together, None
    where each counts by itself; ``failed``: why the rival does not run at all."""

    ratios: Mapping[Workload, Ratio]
    runs: Mapping[Workload, float] | None = None
    failed: str = ""

    def _shares(self) -> dict[Workload, float]:
        """The part of each test, adding up to 1."""
        parts = {t: 1.0 if self.runs is None else self.runs[t] * r.seconds[0] for t, r in self.ratios.items()}
        return {test: part / sum(parts.values()) for test, part in parts.items()}

    @property
    def log(self) -> float:
        """Mean of the logarithms, each by its share."""
        return -math.inf if self.failed else sum(share * self.ratios[t].log for t, share in self._shares().items())

    @property
    def gain(self) -> float:
        """How many times as fast; 0 if it does not run."""
        return math.exp(self.log)

    @property
    def wins(self) -> bool:
        """Whether it is faster on the whole and, where each test counts by itself, slower at nothing."""
        if self.failed:
            return False
        error = math.hypot(*(share * self.ratios[t].error for t, share in self._shares().items()))
        return self.log > max(CERTAIN * error, LEAST) and (self.runs is not None or not self.loses)

    @property
    def loses(self) -> bool:
        """Whether it is slower at anything."""
        return bool(self.failed) or any(r.log < -r.certain for r in self.ratios.values())

    def to_json(self) -> dict[str, Any]:
        """How many times as fast, on the whole and at each test, with the error there and the seconds of both."""
        tests = {
            str(test): {"gain": math.exp(r.log), "error": r.error, "seconds": list(r.seconds)} for test, r in self.ratios.items()
        }
        return {"gain": self.gain, "tests": tests, "failed": self.failed}

    def __str__(self) -> str:
        return self.failed or ", ".join(f"{test} {math.exp(r.log):.3f}x ± {r.error:.3f}" for test, r in self.ratios.items())


def compare(
    runner: Runner,
    base: Path,
    rival: Path,
    tests: Sequence[Workload],
    opened: Sequence[Workload] = (),
    runs: Mapping[Workload, float] | None = None,
) -> Comparison:
    """Run both in turns. ``opened``: all tests that artifacts of this model will be compared at; ``runs``: see
    :class:`Comparison`. Raises RunFailed."""
    runner.open(base, rival, opened or tests)
    return Comparison({test: _ratio(runner, test) for test in tests}, runs)


def check_runs(runner: Runner, base: Path, tests: Sequence[Workload]) -> None:
    """Raise LlmcError if ``base`` does not run: nothing can be compared with it."""
    try:
        runner.open(base, base, tests)
        for test in tests:
            runner.pairs(test, 1)
    except RunFailed as error:
        raise LlmcError(f"the model cannot be tuned: as it is compiled now it does not run: {error}") from error


def _ratio(runner: Runner, test: Workload) -> Ratio:
    pairs: list[tuple[float, float]] = []
    while True:
        pairs += runner.pairs(test, ROUNDS)
        found = summary(pairs)
        if len(pairs) >= MOST or found.error < FINE or abs(found.log) > 2 * found.certain:
            return found


def summary(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Of pairs of seconds. The error is that of a median, from the median of the deviations: one disturbed run changes little."""
    logs = [math.log(a / b) for a, b in pairs]
    middle = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(v - middle) for v in logs)
    seconds = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
    return Ratio(middle, 1.2533 * deviation / math.sqrt(len(logs)), seconds)
