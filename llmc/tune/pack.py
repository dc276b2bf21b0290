"""A folder to carry to a machine that has the device but no compiler and no network: compiled candidates and a runner.

::

    run.py            python run.py: checks and times everything, writes results.jsonl; needs numpy, tvm_ffi and the TVM runtime
    pack.json         tasks: call, family, sizes, for every candidate its library, symbol and configuration; the kernel before it
    task000.npz       the results expected of the task, computed here by the family's reference, and weights packed here
    kernels000.so     compiled candidates of one call, sixteen at most
    llmc/             the few modules of llmc that the runner imports

``llmc tune --import results.jsonl`` brings the records back.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc.errors import InternalError, LlmcError, OutputError
from llmc.schedules import records as records_module
from llmc.schedules.parts import build, built_by
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import call_to_json, config_text, machine_class, source_hash
from llmc.targets.base import Target
from llmc.tune import inputs
from llmc.tune.build import export_kernels
from llmc.tune.search import Config
from llmc.tune.task import Task, from_setup

BATCH = 16
"""Kernels that are compiled at once and share a library."""

CARRIED = (
    "errors.py", "kv_layout.py", "manifest.py", "runtime/device.py", "runtime/gpu/cudart.py", "runtime/host.py",
    "runtime/library.py", "runtime/tensors.py", "runtime/threads.py", "runtime/tile_registers.py", "schedules/parts.py",
    "schedules/protocol.py", "schedules/records.py", "tune/bench.py", "tune/devices.py", "tune/inputs.py", "tune/offline.py",
)  # fmt: skip
RUNNER = "import sys\n\nfrom llmc.tune.offline import main\n\nsys.exit(main())\n"


class _Job(ABC):
    """Work of a pack that a process of its own can do."""

    task: Task

    @abstractmethod
    def run(self) -> Any:
        """Do it here."""


@dataclass(frozen=True)
class _Compile(_Job):
    """Compile configurations, all of one family and call, into one library. ``configs``: by what is built
    (:func:`llmc.schedules.parts.built_by`), as text."""

    task: Task
    configs: dict[str, Config] = field(hash=False)
    path: Path

    def run(self) -> tuple[dict[str, str], list[str]]:
        """What was built -> its symbol; what does not compile, a line each."""
        return _compile(self.task, self.configs, self.path)


@dataclass(frozen=True)
class _Expect(_Job):
    """Save the results expected of a task, and the parts of its weight that only the compiler can pack."""

    task: Task
    path: Path

    def run(self) -> None:
        task = self.task
        packed = inputs.packed_parts(task.call)
        arrays = (inputs.make(task.call, s, packed=packed) for s in task.sizes)
        wanted = [inputs.expected(task.family, task.call, s, a, task.fused) for s, a in zip(task.sizes, arrays, strict=True)]
        named = {f"packed{i}": part for i, part in enumerate(packed)} | {f"wanted{i}": w for i, w in enumerate(wanted)}
        np.savez(self.path, **named)  # type: ignore[arg-type]  # no name is "allow_pickle"


def _done(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[_Job, Any]]:
    """Every job and what came of it, in any order."""
    if workers == 1:
        for job in jobs:
            yield job, job.run()
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {}
        for job in jobs:
            others = {f.name: getattr(job, f.name) for f in fields(job) if f.name != "task"}  # type: ignore[arg-type]
            waiting[pool.submit(_run_elsewhere, type(job), job.task.setup(), others)] = job
        for ready in as_completed(waiting):
            yield waiting[ready], ready.result()


def _run_elsewhere(kind: Any, setup: dict[str, Any], others: dict[str, Any]) -> Any:
    return kind(from_setup(setup), **others).run()


def write(
    folder: Path,
    target: Target,
    chosen: Sequence[tuple[Task, Sequence[Config]]],
    versions: str,
    progress: Callable[[int, int, str], None],
    workers: int = 1,
) -> list[str]:
    """Compile the configurations ``chosen`` for each task into ``folder``, on ``workers`` processes. What did not compile is left
    out and returned, a line each. Raises OutputError if the folder cannot be written or holds something else. Whatever ends it
    before it is done, nothing of it stays.

    Tasks of one call share what they have in common: a kernel that several ranges of rows try is compiled once.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"--offline {folder} is there already and not empty: name a new folder, or remove it")
    problems: list[str] = []
    found: dict[_Key, dict[str, str]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_modules(folder)
        jobs: list[_Job] = [_Expect(task, folder / f"task{number:03}.npz") for number, (task, _) in enumerate(chosen)]
        firsts = {id(task): task.preceding() for task, _ in chosen}
        jobs = _compiles([*chosen, *((first, [first.default]) for first in firsts.values() if first is not None)], folder) + jobs
        done, total = 0, sum(len(job.configs) for job in jobs if isinstance(job, _Compile))
        for job, result in _done(jobs, workers):
            if isinstance(job, _Compile):
                for text, symbol in result[0].items():
                    found[_key(job.task, text)] = {"library": job.path.name, "symbol": symbol}
                problems += result[1]
                done += len(job.configs)
                progress(done, total, job.task.label)
        tasks = []
        for task, configs in chosen:
            candidates = []
            for config in configs:
                place = found.get(_key(task, _text(task, config)))
                if place is not None:
                    source = source_hash(task.family, config_text(config))
                    candidates.append({**place, "config": config, "source": source})
            described = {**task.setup(), "label": task.label, "candidates": candidates}
            first, described["before"] = firsts[id(task)], None
            if first is not None and (key := _key(first, _text(first, first.default))) in found:
                described["before"] = {**found[key], "call": call_to_json(first.call), "sizes": first.sizes}
            tasks.append(described)
        contents = {
            "target": target.name,
            "kind": target.kind,
            "machine": machine_class(target),
            "versions": versions,
            "tasks": tasks,
        }
        (folder / "pack.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"--offline {folder} cannot be written ({error.strerror}): choose a folder with room") from error
    return problems


_Key = tuple[str, KernelCall, str]
"""What is built: family, call and configuration as text."""


def _key(task: Task, text: str) -> _Key:
    family, call = task.runs
    return family.NAME, call, text


def _text(task: Task, config: Config) -> str:
    """Equal for equal code of one family and call."""
    return config_text(built_by(task.runs[0], config))


def _compiles(chosen: Sequence[tuple[Task, Sequence[Config]]], folder: Path) -> list[_Job]:
    tasks: dict[tuple[str, KernelCall], Task] = {}
    wanted: dict[tuple[str, KernelCall], dict[str, Config]] = {}
    for task, configs in chosen:
        key = _key(task, "")[:2]
        tasks.setdefault(key, task)
        wanted.setdefault(key, {}).update({_text(task, c): c for c in configs})
    jobs: list[_Job] = []
    for key, by_text in wanted.items():
        items = list(by_text.items())
        for start in range(0, len(items), BATCH):
            jobs.append(_Compile(tasks[key], dict(items[start : start + BATCH]), folder / f"kernels{len(jobs):03}.so"))
    return jobs


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


def _compile(task: Task, configs: dict[str, Config], path: Path) -> tuple[dict[str, str], list[str]]:
    """The configurations in one library; if that fails, without those that do not even compile alone."""
    functions, names, problems = {}, {}, []
    for i, (text, config) in enumerate(configs.items()):
        try:
            functions[f"k{i}"] = build(*task.runs, task.target, config)
            names[f"k{i}"] = text
        except Exception as error:  # a family may refuse a point of its space in any way
            problems.append(f"{task.family.NAME} {config_text(config)}: {_last_line(error)}")
    try:
        export_kernels(functions, task.target, path)
    except Exception as error:
        if isinstance(error, LlmcError) and not isinstance(error, InternalError):
            raise  # something is missing here, and no candidate would do better
        for name in list(functions):
            try:
                export_kernels({name: functions[name]}, task.target, path)
            except Exception as error:
                del functions[name]
                problems.append(f"{task.family.NAME} {names.pop(name)}: {_last_line(error)}")
        if functions:
            export_kernels(functions, task.target, path)
    return {text: name for name, text in names.items()}, problems


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"
