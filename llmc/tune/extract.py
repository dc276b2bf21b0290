"""From what a user names to tasks, and from records made elsewhere to records here."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc.errors import ArtifactError, LlmcError
from llmc.manifest import FILE_NAME, KernelChoice, read
from llmc.progress import Progress
from llmc.schedules.records import Record, Records, append, config_text, machine_class, parse_line
from llmc.targets.base import Target, folder_name
from llmc.tune.cost_model import CostModel
from llmc.tune.search import Config, enumerate_space, propose
from llmc.tune.task import Task, tasks_of

TRIALS = 64
"""Configurations of a kernel that are tried unless the user says otherwise."""


def records_file(folder: Path, target: Target) -> Path:
    """The file that records of a target go to."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', folder_name(target))}.jsonl"


def find_tasks(model: str, target: Target, pattern: str, compiling: dict[str, Any], progress: Progress) -> list[Task]:
    """The tasks of a model, or of an artifact folder, on ``target``. ``compiling``: how it would be compiled.

    Raises what compiling raises, ArtifactError for an artifact made for another target, UsageError if there is nothing to tune.
    """
    if (Path(model) / FILE_NAME).is_file():
        return tasks_of(_kernels_of_artifact(Path(model), target), target, pattern)
    from llmc import compiler

    return tasks_of(compiler.kernels(model, target=target.name, progress=progress, **compiling), target, pattern)


def _kernels_of_artifact(folder: Path, target: Target) -> list[KernelChoice]:
    variants = read(folder).variants
    for variant in variants:
        if variant.target == target.name:
            if not any(k.call for k in variant.kernels):
                raise ArtifactError(
                    f"the artifact {folder} was made by an llmc that did not yet note the calls of its kernels: recompile it"
                )
            return variant.kernels
    made = ", ".join(v.target for v in variants)
    raise ArtifactError(f"the artifact {folder} has no variant for {target.name} (it has {made}): name one of them with --target")


def pack_offline(folder: Path, target: Target, tasks: Sequence[Task], known: Records, trials: int, progress: Progress) -> list[str]:
    """Pack about ``trials`` candidates into ``folder``, the same number for each task; what did not compile, a line each."""
    from llmc.runtime.host import default_threads
    from llmc.tune import pack
    from llmc.tune.tuner import versions

    rng = random.Random(0)
    choose = Chooser(known, rng)
    chosen = [(task, choose(task, max(2, trials // len(tasks)))) for task in tasks]
    with progress.phase("candidates", total=sum(len(configs) for _, configs in chosen)) as phase:
        return pack.write(folder, target, chosen, versions(), phase.callback(), default_threads())


class Chooser:
    """What to carry to a machine that cannot search: the default first, what records say is best, then what the cost model ranks
    highest and what is unlike it."""

    def __init__(self, known: Records, rng: random.Random) -> None:
        self.known, self.rng = known, rng
        self._models: dict[str, CostModel] = {}

    def __call__(self, task: Task, count: int) -> list[Config]:
        """Up to ``count`` configurations of a task."""
        everything = enumerate_space(task.space, self.rng)
        found = self.known.lookup(task.family, task.call, task.target)
        first = [task.default, *([] if found is None else [{axis: found.config[axis] for axis in task.space}])]
        model = self._model(task)
        score = (lambda configs: model.score(configs, task.call)) if model.ready else None
        unique = list({config_text(c): c for c in first}.values())
        return [*unique, *propose(everything, unique, max(0, count - len(unique)), score, self.rng)]

    def _model(self, task: Task) -> CostModel:
        if task.family.NAME not in self._models:
            model = self._models[task.family.NAME] = CostModel(lambda call: task.family.space(call, task.target))
            model.fit(self.known.of_family(task.family, machine_class(task.target)))
        return self._models[task.family.NAME]


def import_results(path: Path, folder: Path) -> tuple[int, list[str]]:
    """Add the records in ``path`` to the record files in ``folder``: how many, and a sentence for each line that is none.

    Raises LlmcError if the file cannot be read or holds no record, OutputError if they cannot be written.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise LlmcError(f"--import {path} cannot be read ({error.strerror}): name the results.jsonl that run.py wrote") from error
    notes: list[str] = []
    by_target: dict[str, list[Record]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = parse_line(line)
        except ValueError as error:
            notes.append(f"{path} line {number}: not a record ({error}), skipped")
        else:
            by_target.setdefault(record.target, []).append(record)
    if not by_target:
        raise LlmcError(f"--import {path} holds no record: name the results.jsonl that run.py wrote")
    for target, found in by_target.items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", target)
        append(folder / f"{name}.jsonl", found)
    return sum(map(len, by_target.values())), notes
