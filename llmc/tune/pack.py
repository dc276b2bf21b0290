"""A folder to carry to a machine that has the device but no compiler and no network: compiled candidates and a runner.

::

    run.py            python run.py: checks and times everything, writes results.jsonl; needs numpy, tvm_ffi and the TVM runtime
    pack.json         tasks: call, family, sizes, and for every candidate its library, symbol and configuration
    task000.npz       the results expected of the task, computed here by the family's reference
    kernels000.so     compiled candidates
    llmc/             the few modules of llmc that the runner imports

``llmc tune --import results.jsonl`` brings the records back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc.errors import LlmcError, OutputError
from llmc.schedules import records as records_module
from llmc.schedules.parts import build
from llmc.schedules.records import config_text, machine_class, source_hash
from llmc.targets.base import Target
from llmc.tune import inputs
from llmc.tune.build import export_kernels
from llmc.tune.search import Config
from llmc.tune.task import Task

BATCH = 24
"""Kernels that are compiled at once and share a library."""

CARRIED = (
    "errors.py", "kv_layout.py", "manifest.py", "runtime/device.py", "runtime/gpu/cudart.py", "runtime/host.py",
    "runtime/library.py", "runtime/tensors.py", "runtime/threads.py", "schedules/parts.py", "schedules/protocol.py",
    "schedules/records.py", "tune/bench.py", "tune/devices.py", "tune/inputs.py", "tune/offline.py",
)  # fmt: skip
RUNNER = "import sys\n\nfrom llmc.tune.offline import main\n\nsys.exit(main())\n"


def write(
    folder: Path,
    target: Target,
    chosen: Sequence[tuple[Task, Sequence[Config]]],
    versions: str,
    progress: Callable[[int, int, str], None],
) -> list[str]:
    """Compile the configurations ``chosen`` for each task into ``folder``. What did not compile is left out and returned, a line
    each. Raises OutputError if the folder cannot be written or holds something else."""
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"--offline {folder} is there already and not empty: name a new folder, or remove it")
    problems: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_modules(folder)
        tasks, done, total = [], 0, sum(len(configs) for _, configs in chosen)
        for number, (task, configs) in enumerate(chosen):
            wanted = [inputs.expected(task.family, task.call, s, inputs.make(task.call, s)) for s in task.sizes]
            np.savez(folder / f"task{number:03}.npz", *wanted)
            candidates: list[dict[str, Any]] = []
            for start in range(0, len(configs), BATCH):
                name = f"kernels{number:03}_{start // BATCH:02}.so"
                candidates += _compile(task, configs[start : start + BATCH], folder / name, problems)
                done += len(configs[start : start + BATCH])
                progress(done, total, task.label)
            tasks.append({**task.setup(), "source": source_hash(task.family), "label": task.label, "candidates": candidates})
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


def _compile(task: Task, configs: Sequence[Config], path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The configurations in one library; if that fails, without those that do not even compile alone."""
    functions = {}
    for i, config in enumerate(configs):
        try:
            functions[f"k{i}"] = build(task.family, task.call, task.target, config)
        except Exception as error:  # a family may refuse a point of its space in any way
            problems.append(f"{task.label} {config_text(config)}: {_last_line(error)}")
    try:
        export_kernels(functions, task.target, path)
    except LlmcError:
        raise
    except Exception:
        for name in list(functions):
            try:
                export_kernels({name: functions[name]}, task.target, path)
            except Exception as error:
                del functions[name]
                problems.append(f"{task.label} {config_text(configs[int(name[1:])])}: {_last_line(error)}")
        if functions:
            export_kernels(functions, task.target, path)
    return [{"library": path.name, "symbol": name, "config": configs[int(name[1:])]} for name in functions]


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"
