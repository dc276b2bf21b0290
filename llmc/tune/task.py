"""Which kernels a model has to tune, at which sizes, and what a second saved in each is worth."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from llmc import targets
from llmc.errors import UsageError
from llmc.manifest import KernelChoice
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import call_from_json
from llmc.targets.base import Target
from llmc.tune import inputs

TOKENS_PER_PROMPT = 128
"""Tokens generated for each prompt that is read: how decode steps weigh against prefills."""


@dataclass(frozen=True)
class Task:
    """A distinct kernel call of a model, taken by ``family``. ``per_token``, ``per_prefill``: how often a step of decode and of
    extend runs it; ``sizes``: the symbols it is timed at; ``label``: for people."""

    family: Any
    call: KernelCall
    target: Target
    per_token: int
    per_prefill: int
    sizes: tuple[dict[str, int], ...] = field(hash=False)
    label: str = ""

    @property
    def space(self) -> dict[str, list[Any]]:
        """The axes and their values, each one's first the default."""
        found: dict[str, list[Any]] = self.family.space(self.call, self.target)
        return found

    @property
    def default(self) -> dict[str, Any]:
        return {axis: values[0] for axis, values in self.space.items()}

    @property
    def weight(self) -> int:
        """Runs of the kernel for a prompt and its answer."""
        return self.per_token * TOKENS_PER_PROMPT + self.per_prefill

    def setup(self) -> dict[str, Any]:
        """The first message to a worker."""
        from llmc.schedules.records import call_to_json

        return {
            "family": self.family.NAME,
            "call": call_to_json(self.call),
            "target": self.target.name,
            "sizes": list(self.sizes),
        }


def tasks_of(choices: Sequence[KernelChoice], target: Target, pattern: str = "*") -> list[Task]:
    """The tasks among a model's kernels whose name or family fits the shell ``pattern``, heaviest op first.

    Raises UsageError if nothing can be tuned: no such kernel, or none with a choice to make.
    """
    families = {family.NAME: family for family in targets.module_for(target).families(target)}
    counts: dict[tuple[str, KernelCall], list[int]] = {}
    names: dict[tuple[str, KernelCall], str] = {}
    for choice in choices:
        if choice.family not in families or not choice.call:
            continue
        if not any(fnmatch.fnmatch(name, pattern) for name in (choice.kernel, choice.family)):
            continue
        key = choice.family, call_from_json(choice.call)
        at = counts.setdefault(key, [0, 0])
        at[0 if choice.function == "decode" else 1] += choice.count
        phase = key[1].phase
        names[key] = choice.kernel if phase in choice.kernel else f"{choice.kernel} {phase}"
    found = [
        make(families[family], call, target, numbers[0], numbers[1], names[family, call])
        for (family, call), numbers in counts.items()
        if prod(map(len, families[family].space(call, target).values())) > 1
    ]
    if not found:
        kernels = sorted({c.kernel for c in choices if c.call})
        raise UsageError(
            f"no kernel that {pattern!r} fits has configurations to choose from on {target.name}: the model's kernels are "
            f"{', '.join(kernels)}"
        )
    return found


def make(family: Any, call: KernelCall, target: Target, per_token: int = 1, per_prefill: int = 0, label: str = "") -> Task:
    """A task with the sizes of :func:`llmc.tune.inputs.sizes`."""
    name = label or f"{family.NAME}_{call.args[1].shape}"
    return Task(family, call, target, per_token, per_prefill, tuple(inputs.sizes(call, target.kind)), name)
