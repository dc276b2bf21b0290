"""A folder to carry to a machine without a compiler, to decide there about finds in the model: :mod:`llmc.tune.offline_model`."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from llmc.errors import OutputError, UsageError
from llmc.schedules.lookup import Records, slowdowns, worthwhile
from llmc.schedules.records import axes, config_text, machine_class, restore
from llmc.tune.offline_model import PHASES, Packed
from llmc.tune.subject import Subject
from llmc.tune.task import Task, find, workloads
from llmc.tune.tuner import versions
from llmc.tune.validate import Find

MOST = 3
"""Finds of a range of rows whose sets are all compiled; of more, those that promise the least are left out."""

RUNNER = "import sys\n\nfrom llmc.tune.offline_model import main\n\nsys.exit(main())\n"


def known_finds(tasks: Sequence[Task], known: Records) -> list[Find]:
    """What records say is faster alone than what compiles use, and no model has turned down."""
    found = [f for task in tasks if (f := _known_find(task, known)) is not None]
    by_rows = {rows: sorted((f for f in found if f.rows == rows), key=_promised)[:MOST] for rows in {f.rows for f in found}}
    return [f for rows in sorted(by_rows) for f in by_rows[rows]]


def _known_find(task: Task, known: Records) -> Find | None:
    tuned = known.lookup(task.family, task.call, task.target)
    used = config_text(task.default if tuned is None else {axis: tuned.config[axis] for axis in task.space})
    dropped = {v.config for v in known.judged(task.family, task.call, task.target, task.space) if not v.kept}
    mine = [r for r in known.of_family(task.family, machine_class(task.target)) if r.call == task.call]
    mine = [r for r in mine if axes(r.config) == task.space.keys() and restore(r.config, task.space) is not None]
    scores = {text: score for text, score in slowdowns(mine).items() if text == used or text not in dropped}
    if used not in scores or (best := worthwhile(scores, used)) == used:
        return None
    seconds = {(r.config, r.symbols): r.seconds for r in mine}
    saves = []
    for workload, size in zip(workloads(task), task.sizes, strict=True):
        before, after = (seconds.get((text, tuple(sorted(size.items())))) or math.nan for text in (used, best))
        saves.append((workload, (task.per_token + task.per_prefill) * (before - after)))
    return find(task, best, tuple(saves))


def _promised(find: Find) -> float:
    return -sum(seconds for _, seconds in find.saves)


def sets_of(finds: Sequence[Find]) -> list[list[int]]:
    """Artifacts so that every set of a range's finds is in one of them: ranges of rows do not touch each other, nor do phases; what
    is for a whole phase touches ranges, and is in other artifacts than these."""
    by_rows: dict[str, list[int]] = {}
    for i, f in enumerate(finds):
        by_rows.setdefault(f.rows, []).append(i)
    found: list[set[int]] = [set()]
    for of_phases in (False, True):
        groups = [group for rows, group in by_rows.items() if (rows in PHASES) == of_phases]
        subsets = [[set(c) for n in range(1, len(group) + 1) for c in itertools.combinations(group, n)] for group in groups]
        found += [set().union(*column) for column in itertools.zip_longest(*subsets, fillvalue=set())]
    return [sorted(taken) for taken in found]


def write(
    folder: Path,
    subject: Subject,
    tasks: Sequence[Task],
    known: Records,
    progress: Callable[[int, int, str], None],
    share: tuple[int, int] = (0, 1),
) -> Packed:
    """Compile the model into ``folder`` with what compiles use now and with every set of finds. ``share``: of the artifacts every
    n-th from the i-th on, (i, n): several processes may share the work.

    Raises UsageError if records have no finds, OutputError if the folder cannot be written.
    """
    finds = known_finds(tasks, known)
    if not finds:
        raise UsageError(
            f"there is nothing to try in {subject.name}: records have nothing for {subject.target.name} that is faster alone than "
            "what compiles use; search with --offline DIR and without --trials 0 first, and --import what comes of it"
        )
    packed = Packed(subject.name, subject.target.kind, subject.limits.max_batch, versions(), finds, sets_of(finds))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, taken in list(enumerate(packed.artifacts))[share[0] :: share[1]]:
            progress(i, len(packed.artifacts), ", ".join(finds[j].label for j in taken))
            supposed = known.supposing(finds[j].verdict(True, 1.0, subject.name, "", "") for j in taken)
            subject.build(supposed, folder / str(i))
            if i:
                shutil.rmtree(folder / str(i) / "weights")
        packed.write(folder)
        (folder / "run.py").write_text(RUNNER, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--offline {folder} cannot be written ({error.strerror}): choose a folder with room") from error
    return packed
