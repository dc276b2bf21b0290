"""A folder to carry to a machine that has the device but no compiler and no network: compiled candidates and a runner.

::

    run.py            python run.py: checks and times everything, writes results.jsonl; needs numpy, tvm_ffi and the TVM runtime
    pack.json         tasks: call, family, sizes, and for every candidate its library, symbol and configuration
    task000.npz       the results expected of the task, computed here by the family's reference
    kernels000.so     compiled candidates of one call, sixteen at most
    llmc/             the few modules of llmc that the runner imports

``llmc tune --import results.jsonl`` brings the records back.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc import targets
from llmc.errors import LlmcError, OutputError
from llmc.schedules import records as records_module
from llmc.schedules.parts import build, built_by
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import call_from_json, config_text, machine_class, source_hash
from llmc.targets.base import Target
from llmc.tune import inputs
from llmc.tune.build import export_kernels, family_named
from llmc.tune.search import Config
from llmc.tune.task import Task

BATCH = 16
"""Kernels that are compiled at once and share a library."""

CARRIED = (
    "errors.py", "kv_layout.py", "manifest.py", "runtime/device.py", "runtime/gpu/cudart.py", "runtime/host.py",
    "runtime/library.py", "runtime/tensors.py", "runtime/threads.py", "schedules/parts.py", "schedules/protocol.py",
    "schedules/records.py", "tune/bench.py", "tune/devices.py", "tune/inputs.py", "tune/offline.py",
)  # fmt: skip
RUNNER = "import sys\n\nfrom llmc.tune.offline import main\n\nsys.exit(main())\n"


@dataclass(frozen=True)
class _Job:
    """Configurations of a task, all of one family and call, that are compiled into one library."""

    task: Task
    configs: dict[str, Config] = field(hash=False)
    """By what is built (:func:`llmc.schedules.parts.built_by`), as text."""

    library: str


Built = dict[str, str]
"""What is built, as text -> the symbol in its library."""


def write(
    folder: Path,
    target: Target,
    chosen: Sequence[tuple[Task, Sequence[Config]]],
    versions: str,
    progress: Callable[[int, int, str], None],
    workers: int = 1,
) -> list[str]:
    """Compile the configurations ``chosen`` for each task into ``folder``, on ``workers`` processes. What did not compile is left
    out and returned, a line each. Raises OutputError if the folder cannot be written or holds something else.

    Tasks of one call share what they have in common: a kernel that several ranges of rows try is compiled once.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"--offline {folder} is there already and not empty: name a new folder, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_modules(folder)
        jobs, found, problems = _jobs(chosen), {}, []
        done, total = 0, sum(len(job.configs) for job in jobs)
        for job, (built, failed) in _compiled(jobs, folder, workers):
            found |= {(job.task.family.NAME, job.task.call, text): (job.library, symbol) for text, symbol in built.items()}
            problems += failed
            done += len(job.configs)
            progress(done, total, job.task.label)
        tasks = []
        for number, (task, configs) in enumerate(chosen):
            wanted = [inputs.expected(task.family, task.call, s, inputs.make(task.call, s)) for s in task.sizes]
            np.savez(folder / f"task{number:03}.npz", *wanted)
            candidates: list[dict[str, Any]] = []
            for config in configs:
                place = found.get((task.family.NAME, task.call, _text(task, config)))
                if place is not None:
                    source = source_hash(task.family, config_text(config))
                    candidates.append({"library": place[0], "symbol": place[1], "config": config, "source": source})
            tasks.append({**task.setup(), "label": task.label, "candidates": candidates})
        contents = {
            "target": target.name,
            "kind": target.kind,
            "machine": machine_class(target),
            "versions": versions,
            "tasks": tasks,
        }
        (folder / "pack.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--offline {folder} cannot be written ({error.strerror}): choose a folder with room") from error
    return problems


def _text(task: Task, config: Config) -> str:
    return config_text(built_by(task.family, config))


def _jobs(chosen: Sequence[tuple[Task, Sequence[Config]]]) -> list[_Job]:
    tasks: dict[tuple[str, KernelCall], Task] = {}
    wanted: dict[tuple[str, KernelCall], dict[str, Config]] = {}
    for task, configs in chosen:
        key = task.family.NAME, task.call
        tasks.setdefault(key, task)
        wanted.setdefault(key, {}).update({_text(task, c): c for c in configs})
    jobs: list[_Job] = []
    for key, by_text in wanted.items():
        items = list(by_text.items())
        for start in range(0, len(items), BATCH):
            jobs.append(_Job(tasks[key], dict(items[start : start + BATCH]), f"kernels{len(jobs):03}.so"))
    return jobs


def _compiled(jobs: Sequence[_Job], folder: Path, workers: int) -> Iterator[tuple[_Job, tuple[Built, list[str]]]]:
    """Every job and what came of it, in any order."""
    if workers == 1:
        for job in jobs:
            yield job, _compile(job.task.family, job.task.call, job.task.target, job.configs, folder / job.library, job.task.label)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(_compile_named, job.task.setup(), job.configs, folder / job.library, job.task.label): job for job in jobs
        }
        for ready in as_completed(waiting):
            yield waiting[ready], ready.result()


def _compile_named(setup: dict[str, Any], configs: dict[str, Config], path: Path, label: str) -> tuple[Built, list[str]]:
    """A job of another process, from :meth:`Task.setup`."""
    target = targets.parse(setup["target"])
    return _compile(family_named(setup["family"], target), call_from_json(setup["call"]), target, configs, path, label)


def _copy_modules(folder: Path) -> None:
    roots = {"schedules": Path(records_module.__file__).parent}
    for name in CARRIED:
        part, _, rest = name.partition("/")
        source = roots[part] / rest if part in roots else Path(llmc.__file__).parent / name
        to = folder / "llmc" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, to)
    for package in {folder / "llmc", *((folder / "llmc" / name).parent for name in CARRIED)}:
        (package / "__init__.py").touch()
    (folder / "run.py").write_text(RUNNER, encoding="utf-8")


def _compile(
    family: Any, call: KernelCall, target: Target, configs: dict[str, Config], path: Path, label: str
) -> tuple[Built, list[str]]:
    """The configurations in one library; if that fails, without those that do not even compile alone."""
    functions, names, problems = {}, {}, []
    for i, (text, config) in enumerate(configs.items()):
        try:
            functions[f"k{i}"] = build(family, call, target, config)
            names[f"k{i}"] = text
        except Exception as error:  # a family may refuse a point of its space in any way
            problems.append(f"{label} {config_text(config)}: {_last_line(error)}")
    try:
        export_kernels(functions, target, path)
    except LlmcError:
        raise
    except Exception:
        for name in list(functions):
            try:
                export_kernels({name: functions[name]}, target, path)
            except Exception as error:
                del functions[name]
                problems.append(f"{label} {names.pop(name)}: {_last_line(error)}")
        if functions:
            export_kernels(functions, target, path)
    return {text: name for name, text in names.items()}, problems


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"
