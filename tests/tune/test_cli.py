"""``llmc tune`` from the command line, on a tiny model: search, resume, offline, and a compile that uses what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.cli.main import main
from llmc.manifest import read
from llmc.schedules.lookup import load
from llmc.tune import compare
from tests.support.tiny_models import build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    build("llama", folder, dtype="float32")
    return folder


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model in turns: what decides is tested elsewhere."""
    monkeypatch.setattr(compare, "ROUNDS", 2)
    monkeypatch.setattr(compare, "MOST", 4)


@pytest.mark.usefixtures("few_runs")
def test_tune_then_compile(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, out = tmp_path / "records", tmp_path / "out"
    common = [str(model), "--dtype", "float32", "--kernels", "attend_extend*", "--records", str(records), "--quiet"]
    assert main(["tune", *common, "--trials", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (kernel,) = report["kernels"]
    assert kernel["family"] == "cpu.attend"
    assert kernel["trials"] == 3
    assert kernel["gain"] >= 1.0
    assert main(["compile", str(model), "-o", str(out), "--dtype", "float32", "--records", str(records), "--quiet"]) == 0
    choices = {(k.function, k.op): k for k in read(out).variants[0].kernels}
    chosen = choices["extend", "llmc.attend"]
    assert chosen.tuned.startswith("record: ")
    assert chosen.config == kernel["config"]
    assert choices["extend", "llmc.linear"].tuned == "default"
    capsys.readouterr()
    assert main(["tune", str(out), *common[3:], "--trials", "3", "--json", "--resume"]) == 0  # of the artifact: the same kernel
    assert json.loads(capsys.readouterr().out)["kernels"][0]["trials"] == 3
    assert len({record.config for record in load([records]).entries.values()}) == 6  # nothing was tried twice


@pytest.mark.usefixtures("few_runs")
def test_finds_are_decided_in_the_model(model: Path, tmp_path: Path) -> None:
    """Compiled with and without, run in turns by a process of its own; whichever way it goes, the file says so. One find of each
    phase: what is done with several is in test_validate.py."""
    from llmc import targets
    from llmc.progress import SilentProgress
    from llmc.schedules.lookup import Records
    from llmc.schedules.records import call_from_json, config_text
    from llmc.tune.compare import Site
    from llmc.tune.subject import Subject
    from llmc.tune.task import find, tasks_of, workloads
    from llmc.tune.turns import Turns
    from llmc.tune.validate import Find, Validation

    host, runner, known = targets.parse("cpu"), Turns(), Records()
    with Subject(str(model), host, {"dtype": "float32"}, SilentProgress()) as subject:
        tasks = {task.call.phase: task for task in tasks_of(subject.kernels(), host, "linear*")}
        finds = []
        for task in tasks.values():
            config = config_text({axis: values[-1] for axis, values in task.space.items()})
            finds.append(find(task, config, tuple((workload, 1e-6) for workload in workloads(task))))
        assert {f.rows for f in finds} == {"decode", "extend"}
        site = Site(subject.name, runner, known, tmp_path / "r.jsonl", subject.folder, "here", "test")

        def build(tried: frozenset[Find], folder: Path) -> None:
            subject.build(known.supposing([f.verdict(True, 1.0, "", "here", "") for f in tried]), folder)

        try:
            Validation(site, build, 8).run(finds)
        finally:
            runner.close()
        decided = {v.call: v for v in load([tmp_path]).verdicts.values()}
        assert {f.call for f in finds} == decided.keys()
        assert all(0.1 < v.gain < 10 for v in decided.values())
        for kernel in subject.build(known, subject.folder / "again").variants[0].kernels:
            if kernel.call and (verdict := decided.get(call_from_json(kernel.call))) is not None:
                assert (config_text(kernel.config) == verdict.config) == verdict.kept
        first, again = (read(subject.folder / name) for name in ("model0", "again"))
        assert first.tensors == again.tensors
        assert (subject.folder / "model0" / first.tensors[next(iter(first.tensors))].file).stat().st_nlink > 2


def test_offline(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pack"
    kernels = ["--kernels", "attend_extend*", "--trials", "2"]
    assert main(["tune", str(model), "--dtype", "float32", *kernels, "--offline", str(folder), "--quiet"]) == 0
    assert f"python {folder.name}/run.py" in capsys.readouterr().out
    assert len(json.loads((folder / "pack.json").read_text())["tasks"][0]["candidates"]) == 2


def test_finds_are_decided_where_there_is_no_compiler(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second trip: the model with and without what was found; the runner there needs no compiler."""
    from llmc import targets
    from llmc.progress import SilentProgress
    from llmc.schedules.records import Record, append, config_text, machine_class, source_hash
    from llmc.tune.subject import Subject
    from llmc.tune.task import tasks_of

    host, records, folder = targets.parse("cpu"), tmp_path / "records", tmp_path / "pack"
    arguments = ["tune", str(model), "--dtype", "float32", "--kernels", "linear*", "--records", str(records)]
    assert main([*arguments, "--offline", str(folder), "--trials", "0", "--quiet"]) == 2
    assert "there is nothing to try" in capsys.readouterr().err
    with Subject(str(model), host, {"dtype": "float32"}, SilentProgress()) as subject:
        task = next(t for t in tasks_of(subject.kernels(), host, "linear*") if t.call.phase == "decode")
    texts = [config_text({axis: values[i] for axis, values in task.space.items()}) for i in (0, -1)]
    lines = [
        Record(
            task.family.NAME, task.call, tuple(size.items()), host.name, machine_class(host), "here", text, 1e-5 * (2 - i), 0.0, "",
            source_hash(task.family, text), "test",
        )
        for i, text in enumerate(texts) for size in task.sizes
    ]  # fmt: skip
    append(records / "cpu.jsonl", lines)
    assert main([*arguments, "--offline", str(folder), "--trials", "0", "--quiet"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "finds.json", "run.py"]
    assert not (folder / "1" / "weights").exists()
    few = "from llmc.tune import compare; compare.ROUNDS, compare.MOST = 2, 4"
    blocked = (
        f"import runpy, sys; sys.modules['tvm'] = None; {few}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", blocked, str(folder / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kept" in done.stdout
    capsys.readouterr()
    assert main(["tune", "--import", str(folder / "verdicts.jsonl"), "--records", str(records)]) == 0
    assert [v.config for v in load([records]).verdicts.values()] == [texts[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a MODEL or an artifact folder"),
        (["m", "--import", "x"], "give no MODEL"),
        (["m", "--minutes", "0"], "is no time"),
        (["m", "--target", "cpu", "--target", "cpu:x86-64-v3"], "one target is tuned at a time"),
        (["m", "--target", "cuda:sm_80,sm_90a"], "one target is tuned at a time"),
        (["m", "--target", "cpux"], "unknown target 'cpux'"),
        (["m", "--target", "cuda:sm_90a"], "no NVIDIA driver answers on this machine: pack the candidates with --offline DIR"),
        (["m", "--target", "cpu:apple-m1@macos"], "cpu:apple-m1@macos is for"),
        (["m", "--target", "rocm:gfx942", "--offline", "x"], "and rocm:gfx942 is neither"),
        (["--import", "absent.jsonl"], "cannot be read"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before any model is looked for, on a machine without a GPU."""
    monkeypatch.setattr("llmc.runtime.artifact.cuda_devices", list)
    assert main(["tune", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_pattern_that_fits_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(model), "--kernels", "nothing", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "no kernel that 'nothing' fits has configurations to choose from" in error
    assert "attend_extend" in error
