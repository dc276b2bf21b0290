"""The choices of :mod:`llmc.passes.choices`, tried on the compiled model as it would run.

One axis after the other: the model is compiled once for each other value, and runs in turns with the best so far. A value is taken
if a prompt and its answer are faster by more than chance; then the next axis starts from there. So a model costs one compile for
each value and not one for each combination.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError, OutputError
from llmc.passes import choices as family
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import Record, Verdict, config_text, machine_class, source_hash
from llmc.targets.base import Target
from llmc.tune.compare import Comparison, Site, check_runs, compare
from llmc.tune.task import TOKENS_PER_PROMPT
from llmc.tune.turns import RunFailed, Workload

STEP, PROMPT = Workload("decode", 1), Workload("prefill", 512)
RUNS: Mapping[Workload, float] = {STEP: TOKENS_PER_PROMPT, PROMPT: 1}
"""A prompt and its answer."""


@dataclass
class Outcome:
    """``best``: the choices that won; ``tried``: by configuration, how it did against the best there was then; ``kept``: those
    that became the best."""

    best: dict[str, Any]
    tried: dict[str, Comparison] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line for each choice that was tried."""
        return [f"{text}: {self.tried[text]}: {'kept' if text in self.kept else 'not kept'}" for text in self.tried]


class Search:
    """Tries the choices for one model. ``build(choices, folder)`` compiles it; ``call``: what they are kept under."""

    def __init__(self, site: Site, call: KernelCall, target: Target, build: Callable[[family.Choices, Path], Any]) -> None:
        """What the site's records have verdicts on from this device is not tried again."""
        self.site, self.call, self.target, self.build = site, call, target, build
        self.space = family.space(call, target)

    def run(self) -> Outcome:
        """Try every other value of every axis, from what compiles use now. What was decided is recorded after each.

        Raises LlmcError if the model does not even run as it is.
        """
        found = Outcome(asdict(family.find(self.site.known, self.call, self.target)[0]))
        best = self.site.folder / "choices"
        self.build(family.Choices(**found.best), best)
        check_runs(self.site.runner, best, list(RUNS))
        judged = {
            v.config for v in self.site.known.judged(family, self.call, self.target, self.space) if v.device == self.site.device
        }
        for axis, values in self.space.items():
            for value in (v for v in values if v != found.best[axis]):
                choices = {**found.best, axis: value}
                text, rival = config_text(choices), self.site.folder / f"choices{len(found.tried)}"
                if text in judged:
                    continue
                if self.site.over():
                    return found
                comparison = self._try(choices, best, rival)
                found.tried[text] = comparison
                self._keep(config_text(found.best), text, comparison)
                self.site.say(f"{axis}={value}: {comparison}: {'kept' if comparison.wins else 'not kept'}")
                if comparison.wins:
                    found.best, best = choices, rival
                    found.kept.append(text)
        return found

    def _try(self, choices: dict[str, Any], best: Path, rival: Path) -> Comparison:
        try:
            self.build(family.Choices(**choices), rival)
            return compare(self.site.runner, best, rival, list(RUNS), runs=RUNS)
        except OutputError:
            raise  # a full disk says nothing of the choice
        except (RunFailed, LlmcError) as error:
            return Comparison({}, failed=str(error))

    def _keep(self, base: str, rival: str, comparison: Comparison) -> None:
        """What both took, and what follows."""
        lines: list[Record | Verdict] = []
        machine, source, site = machine_class(self.target), source_hash(family, rival), self.site
        for test in RUNS:
            for place, text in enumerate((base, rival)):
                ratio = comparison.ratios.get(test)
                if ratio is None and text == base:
                    continue
                lines.append(
                    Record(
                        family=family.NAME,
                        call=self.call,
                        symbols=(("n", test.rows),),
                        target=self.target.name,
                        machine=machine,
                        device=site.device,
                        config=text,
                        seconds=None if ratio is None else float(f"{ratio.seconds[place]:.4g}"),
                        spread=0.0 if ratio is None else round(ratio.error, 4),
                        error=comparison.failed,
                        source=source,
                        versions=site.versions,
                    )
                )
        lines.append(
            Verdict(
                family=family.NAME,
                call=self.call,
                target=self.target.name,
                machine=machine,
                device=site.device,
                config=rival,
                kept=comparison.wins,
                gain=round(comparison.gain, 4),
                model=site.model,
                source=source,
                versions=site.versions,
            )
        )
        site.write(lines)


def to_json(found: Outcome) -> dict[str, Any]:
    """The outcome as JSON holds it."""
    tried = [
        {"choices": json.loads(text), "gain": c.gain, "kept": text in found.kept, "failed": c.failed}
        for text, c in found.tried.items()
    ]
    return {"best": found.best, "tried": tried}
