"""``llmc inspect`` and the file half of ``llmc verify``, on an artifact made of a manifest and bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmc import manifest
from llmc.errors import ArtifactError, RequestError
from llmc.inspect_artifact import plan_memory
from llmc.progress import SilentProgress
from llmc.runtime.host import host
from llmc.verify import compare, verify_files
from tests.cli.conftest import Llmc, save

WEIGHTS = "weights/weights-00001.safetensors"
PER_TOKEN = 3 * 2 * (4 + 4) * 2
WEIGHTS_BYTES = 50 * 256
"""float16 [99, 64], up to a multiple of 256."""
WORKSPACE_BYTES = 2 * 4096
"""Of two storages, each in a page of its own."""
BUFFERS_BYTES = 4 * 128 * 99 + sum(-(-4 * n // 256) * 256 for n in (512, 512, 512, 9, 8, 128, 8 * 12, 8, 8 * 4096 // 16))
"""128 rows of logits, and the arguments of a step."""


def test_inspect_shows_what_decides(llmc: Llmc, artifact: Path) -> None:
    done = llmc("inspect", artifact)
    assert done.returncode == 0, done.stderr
    for words in (
        "TinyForCausalLM",
        "models/tiny",
        "4K positions (trained for 8K)",
        f"{PER_TOKEN} B (float16, 1 layer of 2 × (4 + 4), 2 layers of 2 × (4 + 4) in a window of 9",
        "up to 8 sequences, 512 rows, 128 rows of logits",
        "cpu:x86-64-v3",
        "needs avx2",
        "21 × linear_1",
        "cpu.linear: rows of 64 fill the registers",
        "extend        9 kernels, workspace 4.1 kB",
    ):
        assert words in done.stdout, words


def test_inspect_json_is_the_manifest_and_the_plan(llmc: Llmc, artifact: Path) -> None:
    found = json.loads(llmc("inspect", artifact, "--json").stdout)
    assert found["kv"]["bytes_per_token"] == PER_TOKEN
    assert found["memory"]["weights_bytes"] == WEIGHTS_BYTES
    assert found["memory"]["workspace_bytes"] == WORKSPACE_BYTES
    assert found["memory"]["buffers_bytes"] == BUFFERS_BYTES
    assert [k["count"] for k in found["variants"][0]["kernels"]] == [21, 3]


def test_memory_plan_counts_whole_pages(artifact: Path) -> None:
    info = manifest.read(artifact)
    fixed = WEIGHTS_BYTES + WORKSPACE_BYTES + BUFFERS_BYTES
    page = 16 * PER_TOKEN
    assert plan_memory(info, fixed + 5 * page).max_context == 80
    assert plan_memory(info, fixed + 6 * page - 1).max_context == 80
    assert plan_memory(info, 10**12).max_context == info.model.context
    with pytest.raises(RequestError, match="do not hold this model"):
        plan_memory(info, fixed + page - 1)


def test_inspect_memory_flag(llmc: Llmc, artifact: Path) -> None:
    assert "all of it" in llmc("inspect", artifact, "--memory", "1GB").stdout
    short = llmc("inspect", artifact, "--memory", "10kB")
    assert short.returncode == 7 and "do not hold this model" in short.stderr


def test_inspect_of_something_else(llmc: Llmc, tmp_path: Path) -> None:
    done = llmc("inspect", tmp_path)
    assert done.returncode == 5 and done.stdout == ""
    assert "not an llmc artifact" in done.stderr and "llmc compile" in done.stderr


def test_verify_of_a_whole_artifact(llmc: Llmc, artifact: Path) -> None:
    done = llmc("verify", artifact)
    assert done.returncode == 0 and done.stdout.startswith("ok      2 files")


def _damage_content(artifact: Path) -> None:
    data = bytearray((artifact / WEIGHTS).read_bytes())
    data[1000] ^= 1
    (artifact / WEIGHTS).write_bytes(data)


def _truncate(artifact: Path) -> None:
    (artifact / WEIGHTS).write_bytes((artifact / WEIGHTS).read_bytes()[:-1])


def _remove(artifact: Path) -> None:
    (artifact / WEIGHTS).unlink()


def _add(artifact: Path) -> None:
    (artifact / "weights" / "more.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_damage_content, f"{WEIGHTS} was altered"),
        (_truncate, f"{WEIGHTS} has 10239 bytes, the manifest says 10240"),
        (_remove, f"{WEIGHTS} is missing"),
        (_add, "weights/more.bin is not in the manifest"),
    ],
)
def test_verify_names_the_file(llmc: Llmc, artifact: Path, damage: object, words: str) -> None:
    damage(artifact)  # type: ignore[operator]
    done = llmc("verify", artifact, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["ok"]
    assert len(report["files"]["problems"]) == 1 and words in report["files"]["problems"][0]
    assert words in llmc("verify", artifact).stdout


def test_an_artifact_that_cannot_run_here_is_found_before_the_reference_is_loaded(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = manifest.read(artifact)
    gpu = replace(info.variants[0], kind="cuda", target="cuda:sm_90a", mcpu="sm_90a", triple=f"{host().machine}-linux-gnu")
    save(artifact, info, variants=[gpu])
    monkeypatch.setattr("llmc.runtime.artifact.cuda_devices", list)
    monkeypatch.setattr("llmc.reference.reference_model", lambda model: pytest.fail("the reference was loaded"))
    with pytest.raises(ArtifactError, match="no NVIDIA driver answers on this machine: add one with `llmc add"):
        compare(artifact, "a model", SilentProgress())


def test_verify_reports_everything_at_once(artifact: Path) -> None:
    _damage_content(artifact)
    _add(artifact)
    (artifact / "variants" / "cpu" / "lib.so").unlink()
    assert len(verify_files(artifact, SilentProgress()).problems) == 3


def test_other_format_version_is_named(llmc: Llmc, artifact: Path) -> None:
    save(artifact, manifest.read(artifact), format=99)
    for command in ("inspect", "verify"):
        done = llmc(command, artifact)
        assert done.returncode == 5 and "manifest format 99" in done.stderr, command


def test_damaged_manifest_is_named(llmc: Llmc, artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    done = llmc("inspect", artifact)
    assert done.returncode == 5 and "damaged" in done.stderr and "Traceback" not in done.stderr
