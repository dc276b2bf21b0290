"""To a machine without a compiler and back: candidates to carry there, and records that were made there."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from llmc.errors import LlmcError
from llmc.progress import Progress
from llmc.schedules.lookup import Records
from llmc.schedules.records import Record, Verdict, append, config_text, machine_class, parse_line
from llmc.targets.base import Target, folder_name
from llmc.tune.cost_model import CostModel
from llmc.tune.search import Config, enumerate_space, propose
from llmc.tune.task import Task


def records_file(folder: Path, target: Target) -> Path:
    """The file that records of a target go to."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', folder_name(target))}.jsonl"


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
    by_target: dict[str, list[Record | Verdict]] = {}
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
