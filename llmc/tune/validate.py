"""Which of the configurations that are faster alone make the model faster: only those become what compiles use.

The model is compiled with what compiles use now (the base) and with what the search found, and both run in turns: decode steps of
the batches that a kernel was tuned for, prompts of its lengths. What was found for one family of kernels and one range of rows is
kept together if the model gains by it. If it does not, or gains by less than half of what the kernels' times promise, the layers
are halved, and each half has its turn, down to single kernels. Ranges of rows do not touch each other's steps, so one artifact
serves all of them; a family's finds are tried on top of what was kept of the family before. In the end all that was kept runs once
more against the first base, and a range of rows that loses then keeps nothing.

Every decision is a verdict in the record file before the next run starts: stopping at any moment loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError, OutputError
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import Verdict
from llmc.tune.compare import Comparison, Site, check_runs, compare
from llmc.tune.turns import RunFailed, Workload

PROMISED = 0.5
"""Part of what kernels alone promise that a model must gain: with less, some kernel of several may well be slower in it."""


@dataclass(frozen=True)
class Find:
    """A configuration that is faster alone than what compiles use. ``rows``: the range of rows it is for, a part of its family or
    a phase; ``saves``: by workload, the seconds of a step that the kernel's time alone promises; ``source``: the hash of what it
    builds, as records have it."""

    family: str
    call: KernelCall
    target: str
    machine: str
    config: str
    source: str
    rows: str
    saves: tuple[tuple[Workload, float], ...]
    label: str

    @property
    def layer(self) -> tuple[str, KernelCall]:
        """The kernel for all ranges of rows."""
        return self.family, replace(self.call, phase="")

    def verdict(self, kept: bool, gain: float, model: str, device: str, versions: str) -> Verdict:
        """What a model decided of it."""
        return Verdict(
            family=self.family,
            call=self.call,
            target=self.target,
            machine=self.machine,
            device=device,
            config=self.config,
            kept=kept,
            gain=gain,
            model=model,
            source=self.source,
            versions=versions,
        )


@dataclass(frozen=True)
class Group:
    """What was decided of some finds together. ``kept``: those that compiles use from now on."""

    title: str
    comparison: Comparison
    tried: tuple[Find, ...]
    kept: tuple[Find, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        kernels = [find.label for find in self.tried]
        return {"family": self.tried[0].family, "kernels": kernels, "kept": bool(self.kept), **self.comparison.to_json()}


Build = Callable[[frozenset[Find], Path], Any]
"""Compiles the model into a folder as if the finds had won."""


class Validation:
    """Validates finds in one model. Thin: where there is no compiler, ``build`` may have made everything before."""

    def __init__(self, site: Site, build: Build, most_sequences: int) -> None:
        """``most_sequences``: that the model decodes together."""
        self.site, self.build, self.most_sequences = site, build, most_sequences
        self.groups: list[Group] = []
        self.final: dict[str, Comparison] = {}
        self._built: dict[frozenset[Find], Path] = {}
        self._below: tuple[Find, ...] = ()

    def run(self, finds: Sequence[Find]) -> None:
        """Decide about all of them, unless time is up before; :attr:`groups` and :attr:`final` say how it went.

        Raises LlmcError if the model does not run with what compiles use now, OutputError if a verdict cannot be written.
        """
        if not finds or self.site.over():
            return
        check_runs(self.site.runner, self._artifact(()), self._tests(finds))
        kept: list[Find] = []
        for name in dict.fromkeys(find.family for find in finds):
            of_family = [find for find in finds if name == find.family]
            self._below = tuple(kept)
            found = self._decide(of_family, {find.rows for find in of_family})
            self.groups += found
            kept += [find for group in found for find in group.kept]
        if kept and not self.site.over():
            self._confirm(kept)

    def _artifact(self, finds: Iterable[Find]) -> Path:
        """The model as compiles would make it if ``finds`` had won."""
        key = frozenset(finds)
        if key not in self._built:
            folder = self.site.folder / f"model{len(self._built)}"
            self.site.say(f"compiling the model with {len(key)} finds" if key else "compiling the model as it is")
            self.build(key, folder)
            self._built[key] = folder
        return self._built[key]

    def _tests(self, finds: Iterable[Find]) -> list[Workload]:
        """What decides about them, without what the model cannot run."""
        tests = dict.fromkeys(test for find in finds for test, _ in find.saves)
        return [t for t in tests if t.sequences <= self.most_sequences] or list(tests)[:1]

    def _decide(self, finds: Sequence[Find], ranges: set[str]) -> list[Group]:
        """Groups of one family's ``finds``, a group or more for each range of rows in ``ranges``."""
        members = {rows: tuple(f for f in finds if f.rows == rows) for rows in sorted(ranges)}
        members = {rows: group for rows, group in members.items() if group}
        if not members or self.site.over():
            return []
        compared = self._compared(members)
        done: list[Group] = []
        unclear: dict[str, Group] = {}
        for rows, comparison in compared.items():
            group = members[rows]
            doubted = len(group) > 1 and not (comparison.wins and comparison.log >= PROMISED * self._promised(group, comparison))
            found = Group(self._title(group), comparison, group, group if comparison.wins else ())
            self.site.say(f"{found.title}: {comparison}: {'in halves' if doubted else 'kept' if found.kept else 'not kept'}")
            if doubted:
                unclear[rows] = found
            else:
                done.append(self._settle(found))
        return done + self._halves(finds, unclear)

    def _halves(self, finds: Sequence[Find], unclear: dict[str, Group]) -> list[Group]:
        """Each half of the layers for the ranges that all together decided nothing about; the better of whole and halves."""
        if not unclear:
            return []
        layers = sorted({f.layer for rows in unclear for f in unclear[rows].tried}, key=lambda layer: -_weight(finds, layer))
        halves = (set(layers[0::2]), set(layers[1::2]))
        found = [self._decide([f for f in finds if f.layer in half], set(unclear)) for half in halves]
        done: list[Group] = []
        for rows, whole in unclear.items():
            parts = [g for groups in found for g in groups if g.tried[0].rows == rows]
            apart = sum(g.comparison.log for g in parts if g.kept)
            better = whole.kept and whole.comparison.log > apart
            done += [self._settle(whole)] if better else parts
        return done

    def _compared(self, members: dict[str, tuple[Find, ...]]) -> dict[str, Comparison]:
        """Run the model with all of the members against the base, at the tests of each range."""
        everything, base = [find for group in members.values() for find in group], self._artifact(self._below)
        try:
            rival, opened = self._artifact([*self._below, *everything]), self._tests(everything)
            return {rows: compare(self.site.runner, base, rival, self._tests(group), opened) for rows, group in members.items()}
        except OutputError:
            raise  # a full disk says nothing of what was found
        except (RunFailed, LlmcError) as error:
            return {rows: Comparison({}, failed=str(error)) for rows in members}

    def _promised(self, finds: Sequence[Find], comparison: Comparison) -> float:
        """The logarithm of the gain that the kernels' times alone promise."""
        logs = []
        for test, ratio in comparison.ratios.items():
            saved = sum(seconds for find in finds for t, seconds in find.saves if t == test)
            logs.append(-math.log(max(0.5, 1 - saved / ratio.seconds[0])))
        return sum(logs) / len(logs)

    def _title(self, finds: Sequence[Find]) -> str:
        labels = ", ".join(find.label for find in finds) if len(finds) < 4 else f"{len(finds)} kernels"
        return f"{finds[0].family}, {finds[0].rows} ({labels})"

    def _settle(self, group: Group) -> Group:
        """Write what was decided."""
        self._write(group.tried, bool(group.kept), group.comparison.gain)
        return group

    def _confirm(self, kept: Sequence[Find]) -> None:
        """All that was kept against what compiles used before; nothing of a range that loses by it stays."""
        first, last = self._artifact(()), self._artifact(kept)
        for rows in dict.fromkeys(find.rows for find in kept):
            members = [find for find in kept if find.rows == rows]
            try:
                comparison = compare(self.site.runner, first, last, self._tests(members), self._tests(kept))
            except RunFailed as error:
                comparison = Comparison({}, failed=str(error))
            self.final[rows] = comparison
            if comparison.loses or comparison.log < 0:
                self._write(members, False, comparison.gain)
            self.site.say(f"all that was kept, {rows}: {comparison}")

    def _write(self, finds: Iterable[Find], kept: bool, gain: float) -> None:
        site = self.site
        site.write([find.verdict(kept, round(gain, 4), site.model, site.device, site.versions) for find in finds])


def _weight(finds: Iterable[Find], layer: tuple[str, KernelCall]) -> float:
    """Seconds that a layer's finds promise."""
    return sum(seconds for find in finds if find.layer == layer for _, seconds in find.saves)
