"""The folder for a machine without a compiler: it runs without TVM's Python package, survives its candidates, and its records
are those that compiling uses."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from llmc import targets
from llmc.errors import LlmcError, OutputError, UnsupportedError
from llmc.schedules.cpu import attend, linear, quantized_linear
from llmc.schedules.lookup import Records, load
from llmc.schedules.records import config_text
from llmc.tune import inputs, pack
from llmc.tune.extract import Chooser, import_results
from llmc.tune.task import Task
from tests.tune.faulty import FAULTY

HOST = targets.parse("cpu")
LINEAR = Task(linear, linear._call(40, 72, bias=1), HOST, 1, 1, ({"n": 5}, {"n": 40}), "linear")
QUANTIZED = Task(quantized_linear, quantized_linear.SHAPES["odd_33x70_int8"], HOST, 1, 0, ({"n": 4},), "quantized")
ATTEND = Task(
    attend, attend._call(4, 2, 16, page_size=8), HOST, 0, 1,
    ({"n": 20, "b": 1, "b+1": 2, "m": 4, "num_pages": 4, "context": 30},), "attend",
)  # fmt: skip
FAULTS = Task(FAULTY, linear._call(24, 32), HOST, 1, 0, ({"n": 3},), "faulty")


def write(folder: Path, *chosen: tuple[Task, list[dict[str, Any]]]) -> list[str]:
    return pack.write(folder, HOST, chosen, "test", lambda done, total, what: None)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The runner in an environment of its own; every module it imports is named on stderr."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPROFILEIMPORTTIME": "1", "TVM_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "run.py"), "--rounds", "3", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_packed_candidates_run_without_the_compiler_and_come_back_as_records(tmp_path: Path) -> None:
    folder, rng = tmp_path / "pack", random.Random(0)
    choose = Chooser(Records(), rng)
    chosen = [(task, choose(task, 3)) for task in (LINEAR, ATTEND, QUANTIZED)]
    assert [config_text(configs[0]) for _, configs in chosen] == [config_text(t.default) for t in (LINEAR, ATTEND, QUANTIZED)]
    assert write(folder, *chosen) == []
    done = run(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 of 3 tasks timed" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "llmc.tune.bench" in imported
    assert not {"tvm", "torch.nn", "xgboost", "filelock"} & imported
    count, notes = import_results(folder / "results.jsonl", tmp_path / "records")
    assert (count, notes) == (3 * 2 + 3 + 3, [])
    known = load([tmp_path / "records"])
    for task in (LINEAR, ATTEND, QUANTIZED):
        found = known.lookup(task.family, task.call, HOST)
        assert found is not None
        assert found.origin == "record"


def test_tasks_of_one_call_share_kernels_and_processes_compile_them(tmp_path: Path) -> None:
    """Also what a process that compiles is told of a task is all that it needs."""
    other = dataclasses.replace(LINEAR, sizes=({"n": 9},), label="other")
    configs = Chooser(Records(), random.Random(0))(LINEAR, 3)
    folder = tmp_path / "pack"
    assert pack.write(folder, HOST, [(LINEAR, configs), (other, configs[:2])], "test", lambda *_: None, workers=2) == []
    first, second = json.loads((folder / "pack.json").read_text())["tasks"]
    assert second["candidates"] == first["candidates"][:2]
    assert [path.name for path in folder.glob("*.so")] == ["kernels000.so"]
    done = run(folder, "--ahead", "1")
    assert "2 of 2 tasks timed" in done.stdout, done.stderr[-2000:]
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [r["symbols"]["n"] for r in records] == [5, 40, 5, 40, 5, 40, 9, 9]
    assert all(r["seconds"] > 0 for r in records)


def test_a_candidate_that_does_not_compile_is_left_out_and_named(tmp_path: Path) -> None:
    block = FAULTS.default["row_block"]
    configs = [{"fault": fault, "row_block": block} for fault in ("none", "refused", "fine")]
    problems = write(tmp_path / "pack", (FAULTS, configs))
    assert len(problems) == 1
    assert "this configuration is refused" in problems[0]
    task = json.loads((tmp_path / "pack" / "pack.json").read_text())["tasks"][0]
    assert [c["config"]["fault"] for c in task["candidates"]] == ["none", "fine"]


def test_wrong_and_crashing_candidates_fail_alone(tmp_path: Path) -> None:
    folder, block = tmp_path / "pack", FAULTS.default["row_block"]
    configs = [{"fault": fault, "row_block": block} for fault in ("none", "wrong", "fine")]
    assert write(folder, (FAULTS, configs)) == []
    contents = json.loads((folder / "pack.json").read_text())
    crashing = {"library": "crash.so", "symbol": "k0", "config": {"fault": "crash", "row_block": block}, "source": ""}
    contents["tasks"][0]["candidates"].insert(1, crashing)
    (folder / "pack.json").write_text(json.dumps(contents))
    source = folder / "crash.c"  # ends the process as soon as it is loaded
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) static void end(void) { abort(); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "crash.so"), str(source)], check=True)
    assert run(folder, "--out", str(tmp_path / "out.jsonl")).returncode == 0
    found = Records()
    found.read(tmp_path / "out.jsonl")
    errors = {json.loads(r.config)["fault"]: r.error for r in found.entries.values()}
    assert errors["none"] == errors["fine"] == ""
    assert "wrong result" in errors["wrong"]
    assert "ended with status" in errors["crash"]


@pytest.mark.parametrize("error", [UnsupportedError("no inputs"), KeyboardInterrupt()])
def test_what_is_not_finished_is_removed(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(inputs, "expected", fail)
    with pytest.raises(type(error)):
        write(tmp_path / "pack", (LINEAR, [LINEAR.default]))
    assert not (tmp_path / "pack").exists()


def test_errors_that_a_user_can_make(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="not empty: name a new folder"):
        write(tmp_path / "full")
    with pytest.raises(LlmcError, match="cannot be read"):
        import_results(tmp_path / "absent", tmp_path)
    (tmp_path / "other.jsonl").write_text("{}\nhello\n")
    with pytest.raises(LlmcError, match="holds no record"):
        import_results(tmp_path / "other.jsonl", tmp_path)
