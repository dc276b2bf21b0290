"""Which kernels a model has to tune, at which sizes, and what a second saved in each is worth."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from llmc import targets
from llmc.errors import UsageError
from llmc.manifest import KernelChoice
from llmc.schedules.parts import has_parts, kept_under, part_of
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import call_from_json, call_to_json, machine_class, source_hash
from llmc.targets.base import Target
from llmc.tune import inputs
from llmc.tune.turns import Workload
from llmc.tune.validate import Find

TOKENS_PER_PROMPT = 128
"""Tokens generated for each prompt that is read: how decode steps weigh against prefills."""

PROMPT = 512
"""Tokens of a prompt that kernels of a single row of it are judged by."""

STEP_ROWS = 128
"""Rows up to which a part counts as run by decode steps: more sequences are rarely decoded together, shorter prompts rarely
read."""


Kernel = tuple[Any, KernelCall]
"""Family and call of a kernel."""


@dataclass(frozen=True)
class Task:
    """A distinct kernel call of a model, taken by ``family``, or a part of one. ``per_token``, ``per_prefill``: how often a step of
    decode and of extend runs it; ``sizes``: the symbols it is timed at; ``label``: for people; ``part``: the axis that is searched
    alone, empty for the whole space (:mod:`llmc.schedules.parts`); ``logits``: it gives the logits, of a prompt those of its last
    row alone; ``before``: what runs before it, and what it is timed behind (None: behind itself); ``fused``: the family and the
    call that steps run in its place, of the same operands, and what is built and timed (None: itself)."""

    family: Any
    call: KernelCall
    target: Target
    per_token: int
    per_prefill: int
    sizes: tuple[dict[str, int], ...] = field(hash=False)
    label: str = ""
    part: str = ""
    logits: bool = False
    before: Kernel | None = None
    fused: Kernel | None = None

    @property
    def runs(self) -> Kernel:
        """What is built and timed."""
        return self.fused or (self.family, self.call)

    @property
    def space(self) -> dict[str, list[Any]]:
        """The axes and their values, each one's first the default."""
        found: dict[str, list[Any]] = self.family.space(self.call, self.target)
        return {self.part: found[self.part]} if self.part else found

    @property
    def default(self) -> dict[str, Any]:
        return {axis: values[0] for axis, values in self.space.items()}

    @property
    def in_steps(self) -> bool:
        """Whether decode steps run it at its sizes, and not prompts."""
        return max(self.sizes[-1].values()) <= STEP_ROWS if self.part else self.call.phase == "decode"

    @property
    def weight(self) -> int:
        """Runs of the kernel for a prompt and its answer."""
        return self.per_token * TOKENS_PER_PROMPT + self.per_prefill

    def setup(self) -> dict[str, Any]:
        """What another process needs to know, as JSON holds it."""
        return {
            "family": self.family.NAME,
            "call": call_to_json(self.call),
            "target": self.target.name,
            "sizes": list(self.sizes),
            "part": self.part,
            "before": _kernel_to_json(self.before),
            "fused": _kernel_to_json(self.fused),
        }

    def preceding(self) -> Task | None:
        """The kernel before, at the sizes of the steps that have the task's."""
        if self.before is None:
            return None
        family, call = self.before
        rows = [int(self.call.args[0].bind(size)[0]) for size in self.sizes]
        parts = {part_of(family, call, self.target, n) for n in rows}
        sizes = tuple(inputs.at_rows(call, n) for n in rows)
        return Task(family, call, self.target, 0, 0, sizes, part=parts.pop() if len(parts) == 1 else "")


def workloads(task: Task) -> list[Workload]:
    """What shows the task's kernel at work in a model, one for each of its sizes."""
    found = []
    for size in task.sizes:
        if not task.in_steps:
            found.append(Workload("prefill", PROMPT if task.logits else size["n"]))
        elif "context" in size:
            found.append(Workload("decode", size["b"], size["context"]))
        else:
            found.append(Workload("decode", max(size.values())))
    return found


def find(task: Task, config: str, saves: tuple[tuple[Workload, float], ...]) -> Find:
    """That a configuration (as text) of the task is worth trying in a model."""
    return Find(
        family=task.family.NAME,
        call=task.call,
        target=task.target.name,
        machine=machine_class(task.target),
        config=config,
        source=source_hash(task.family, config),
        rows=task.part or task.call.phase,
        saves=saves,
        label=task.label,
    )


def from_setup(setup: dict[str, Any]) -> Task:
    """The task of :meth:`Task.setup` without its counts. Raises UsageError for a family that the target does not have."""
    from llmc.tune.build import family_named

    target = targets.parse(setup["target"])

    def kernel(value: dict[str, Any]) -> Kernel:
        return family_named(value["family"], target), call_from_json(value["call"])

    before, fused = (kernel(value) if value is not None else None for value in (setup["before"], setup["fused"]))
    return Task(*kernel(setup), target, 0, 0, tuple(setup["sizes"]), part=setup["part"], before=before, fused=fused)


def _kernel_to_json(kernel: Kernel | None) -> dict[str, Any] | None:
    return None if kernel is None else {"family": kernel[0].NAME, "call": call_to_json(kernel[1])}


def tasks_of(choices: Sequence[KernelChoice], target: Target, pattern: str = "*") -> list[Task]:
    """The tasks among a model's kernels whose name or family fits the shell ``pattern``, heaviest op first.

    Raises UsageError if nothing can be tuned: no such kernel, or none with a choice to make.
    """
    families = {family.NAME: family for family in targets.module_for(target).families(target)}
    counts: dict[tuple[str, KernelCall], list[int]] = {}
    names: dict[tuple[str, KernelCall], str] = {}
    fused: dict[tuple[str, KernelCall], Kernel] = {}
    for choice in choices:
        if choice.family not in families or not choice.call:
            continue
        if not any(fnmatch.fnmatch(name, pattern) for name in (choice.kernel, choice.family)):
            continue
        call = call_from_json(choice.call)
        family, measured = kept_under(families[choice.family], call)
        key = family.NAME, measured
        at = counts.setdefault(key, [0, 0])
        at[0 if choice.function == "decode" else 1] += choice.count
        if choice.function == "decode" and choice.family != family.NAME and call.args == measured.args:
            fused[key] = families[choice.family], call
        names[key] = choice.kernel if call.phase in choice.kernel or measured != call else f"{choice.kernel} {call.phase}"
    befores = {phase: _before(choices, families, phase) for phase in ("decode", "extend")} if target.kind == "cuda" else {}
    heads = [choice.call for choice in choices if choice.function == "extend" and choice.op in LAYERS]
    head, found = call_from_json(heads[-1]) if heads else None, []
    for (name, call), (per_token, per_prefill) in counts.items():
        if prod(map(len, families[name].space(call, target).values())) > 1:
            before = {phase: found_before[name, call] for phase, found_before in befores.items() if (name, call) in found_before}
            label = names[name, call]
            counted = per_token, per_prefill, label
            found += make(families[name], call, target, *counted, logits=call == head, before=before, fused=fused.get((name, call)))
    if not found:
        kernels = sorted({c.kernel for c in choices if c.call})
        raise UsageError(
            f"no kernel that {pattern!r} fits has configurations to choose from on {target.name}: the model's kernels are "
            f"{', '.join(kernels)}"
        )
    return found


def _before(choices: Sequence[KernelChoice], families: Mapping[str, Any], phase: str) -> dict[tuple[str, KernelCall], Kernel]:
    """By the family and the call that records are kept under, what runs before a kernel in a step of ``phase``.

    Kernels are listed in the order of their first use, and the first one of a layer follows the last one of the layer before.
    What tuning has no inputs for is passed over: such kernels are small.
    """
    mine = [c for c in choices if c.function == phase and c.family in families and c.call]
    kernels = [(kept_under(families[c.family], call_from_json(c.call)), c.count) for c in mine]
    kernels = [(kernel, count) for kernel, count in kernels if kernel[1].op in inputs.KNOWN]
    layer = [kernel for kernel, count in kernels if count > 1]
    found: dict[tuple[str, KernelCall], Kernel] = {}
    for i, ((family, call), _) in enumerate(kernels):
        before = layer[-1] if layer and layer[0] == (family, call) else kernels[i - 1][0] if i else None
        if before is not None:
            found.setdefault((family.NAME, call), before)
    return found


LAYERS = ("llmc.linear", "llmc.quantized_linear")
"""The last of these in a model gives its logits."""


def make(
    family: Any,
    call: KernelCall,
    target: Target,
    per_token: int = 1,
    per_prefill: int = 0,
    label: str = "",
    logits: bool = False,
    before: Mapping[str, Kernel] | None = None,
    fused: Kernel | None = None,
) -> list[Task]:
    """The tasks of a call: one with the sizes of :func:`llmc.tune.inputs.sizes`, or one for each part of the family. Without parts,
    one that gives ``logits`` runs a prompt's last row. ``before``: by phase, what runs before it in the model; ``fused``: what
    steps run in its place."""
    before = before or {}
    name, (family, call) = label or f"{family.NAME}_{call.args[1].shape}", kept_under(family, call)
    if not has_parts(family):
        sizes = [{"n": 1}] if logits else inputs.sizes(call, target.kind)
        behind = before.get(call.phase)
        return [Task(family, call, target, per_token, per_prefill, tuple(sizes), name, logits=logits, before=behind)]
    found = []
    for part, sizes in family.parts(call, target).items():
        if len(family.space(call, target)[part]) < 2:
            continue
        few = max(sizes[-1].values()) <= STEP_ROWS
        steps, behind = ((per_token, 0), before.get("decode")) if few else ((0, per_prefill), before.get("extend"))
        runs = fused if few else None
        found.append(Task(family, call, target, *steps, tuple(sizes), f"{name} n={part}", part, before=behind, fused=runs))
    return found
