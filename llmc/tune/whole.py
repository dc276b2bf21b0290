"""``llmc tune --whole``: the choices of :mod:`llmc.passes.choices`, measured on the compiled model as it would run.

One axis after the other: the model is compiled once for each other value, and runs beside the best so far, in turns, each time in a
process of its own. A value is taken if a prompt and its answer are faster by more than the runs differ; then the next axis starts
from there. So a model costs one compile for each value and not one for each combination.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError
from llmc.passes import choices as family
from llmc.progress import Progress
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import Record, Records, append, config_text, machine_class, source_hash
from llmc.targets.base import Target
from llmc.tune.offline import spread
from llmc.tune.task import TOKENS_PER_PROMPT
from llmc.tune.tuner import versions

PROMPT, ANSWER = 512, TOKENS_PER_PROMPT
ROUNDS = 3
SECONDS = 600.0
"""One run of a model may take, loading included."""

Times = tuple[float, float]
"""Seconds of a decode step, and of the prompt."""

Run = Callable[[Path], Times]


class RunFailed(Exception):
    """A compiled model that does not run to its end. The text says why."""


def bench(artifact: Path) -> Times:
    """Run the artifact in a process of its own. Raises RunFailed."""
    command = [sys.executable, "-m", "llmc.cli.main", "bench", str(artifact), "-p", str(PROMPT), "-n", str(ANSWER), "-r", "2"]
    try:
        done = subprocess.run([*command, "--format", "json", "--quiet"], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"no result within {SECONDS:g} s") from None
    if done.returncode:
        raise RunFailed((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    speed = {row["test"]: row["tokens_per_second"] for row in json.loads(done.stdout)["rows"]}
    return 1.0 / speed[f"tg{ANSWER}"], PROMPT / speed[f"pp{PROMPT}"]


@dataclass
class Outcome:
    """``best``: the choices that won; ``times``: by configuration, the medians; ``failed``: by configuration, why; ``device``:
    where it was measured."""

    best: dict[str, Any]
    times: dict[str, Times] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def cost(self, text: str) -> float:
        """Seconds of a prompt and its answer."""
        step, prompt = self.times[text]
        return ANSWER * step + prompt

    def table(self) -> str:
        """A line for each choice that was tried, the best marked."""
        best, first = config_text(self.best), next(iter(self.times))
        lines = []
        for text, (step, prompt) in self.times.items():
            gain = self.cost(first) / self.cost(text)
            mark = "  <- best" if text == best else ""
            lines.append(f"{text}: {1 / step:.1f} tok/s, prompt {PROMPT / prompt:.1f} tok/s, {gain:.3f}x{mark}")
        return "\n".join([*lines, *(f"{text}: failed: {why}" for text, why in self.failed.items())])

    def to_json(self) -> str:
        tried = [{"choices": json.loads(t), "seconds": [*self.times[t]], "cost": self.cost(t)} for t in self.times]
        return json.dumps({"device": self.device, "best": self.best, "tried": tried, "failed": self.failed}, indent=1)


class Search:
    """Measures the choices for one model. ``build(choices, folder)`` compiles it; ``run`` times what was compiled."""

    def __init__(
        self,
        call: KernelCall,
        target: Target,
        build: Callable[[dict[str, Any], Path], None],
        out: Path,
        known: Records,
        device: str,
        run: Run = bench,
    ) -> None:
        self.call, self.target, self.build, self.out, self.known, self.run = call, target, build, out, known, run
        self.space = family.space(call, target)
        self.found = Outcome({axis: values[0] for axis, values in self.space.items()}, device=device)
        self._samples: dict[str, list[Times]] = {}

    def search(self, progress: Progress) -> Outcome:
        """Try every other value of every axis. What was measured is recorded after each, so an interrupt loses nothing before it.

        Raises LlmcError if the model does not even run with the defaults.
        """
        total = 1 + sum(len(values) - 1 for values in self.space.values())
        with tempfile.TemporaryDirectory(prefix="llmc-tune-") as folder, progress.phase("whole model", total=total) as phase:
            best = Path(folder) / "best"
            text = config_text(self.found.best)
            if not self._try(self.found.best, best):
                raise LlmcError(f"the model cannot be tuned: with llmc's defaults it does not run: {self.found.failed[text]}")
            phase.update(1, "defaults")
            done = 1
            for axis, values in self.space.items():
                for value in values[1:]:
                    rival = Path(folder) / "rival"
                    choices = {**self.found.best, axis: value}
                    won = self._try(choices, rival, against=(config_text(self.found.best), best))
                    if won:
                        self.found.best, best = choices, best.parent / f"best{done}"
                        rival.rename(best)
                    done += 1
                    phase.update(done, f"{axis}={value}: {'kept' if won else 'no gain'}")
        return self.found

    def _try(self, choices: dict[str, Any], folder: Path, against: tuple[str, Path] | None = None) -> bool:
        """Compile and time, in turns with ``against``; whether it runs and is faster. All outcomes are recorded."""
        text = config_text(choices)
        if folder.exists():
            shutil.rmtree(folder)
        try:
            self.build(choices, folder)
            for _ in range(ROUNDS):
                self._sample(text, folder)
                if against is not None:
                    self._sample(*against)
        except (RunFailed, LlmcError) as error:
            self.found.failed[text] = str(error)
            self._keep(text)
            return False
        self._keep(text)
        if against is None:
            return True
        self._keep(against[0])
        return self.found.cost(text) < self.found.cost(against[0]) * (1 - self._noise(against[0]))

    def _sample(self, text: str, folder: Path) -> None:
        self._samples.setdefault(text, []).append(self.run(folder))
        columns = list(zip(*self._samples[text], strict=True))
        self.found.times[text] = (statistics.median(columns[0]), statistics.median(columns[1]))

    def _noise(self, text: str) -> float:
        """What two runs of the same differ by, as a part: the spread of its medians, at least half a percent."""
        costs = [ANSWER * step + prompt for step, prompt in self._samples[text]]
        return max(0.005, spread(costs) / math.sqrt(len(costs)))

    def _keep(self, text: str) -> None:
        error, samples = self.found.failed.get(text, ""), self._samples.get(text, [])
        records = []
        for column, n in enumerate((1, PROMPT)):
            values = [s[column] for s in samples]
            records.append(
                Record(
                    family=family.NAME,
                    call=self.call,
                    symbols=(("n", n),),
                    target=self.target.name,
                    machine=machine_class(self.target),
                    device=self.found.device,
                    config=text,
                    seconds=None if error else float(f"{statistics.median(values):.4g}"),
                    spread=0.0 if error else round(spread(values), 3),
                    error=error,
                    source=source_hash(family, text),
                    versions=versions(),
                )
            )
        append(self.out, records)
        for record in records:
            self.known.add(record)


def search_model(model: str, target: Target, compiling: dict[str, Any], out: Path, progress: Progress) -> Outcome:
    """Search the choices for ``model`` (what ``llmc compile`` takes) and add the records to the file ``out``.

    ``compiling``: keyword arguments of :func:`llmc.compile`. Raises what compiling raises, OutputError if records cannot be
    written.
    """
    from llmc.compiler import compile as compile_model
    from llmc.settings import whole_model_of
    from llmc.tune.devices import open_device

    compiling = {name: value for name, value in compiling.items() if name != "page_size"}

    def build(choices: dict[str, Any], folder: Path) -> None:
        compile_model(model, out=folder, target=target.name, choices=family.Choices(**choices), progress=progress, **compiling)

    device = open_device(target.kind)
    device.close()
    call = whole_model_of(model, **compiling)
    return Search(call, target, build, out, Records(), device.name).search(progress)
