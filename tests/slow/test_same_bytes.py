"""The same model, options and packages give the same artifact, whatever the process, its hash seed and where it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TARGETS = ("cpu:x86-64-v3", "cpu:aarch64+dotprod", "cpu:apple-m1@macos", "cpu:x86-64-v3@windows", "rocm:gfx942", "metal:apple8",
           "opencl:generic", "cuda:sm_80")  # fmt: skip


def compiled(model: Path, folder: Path, seed: str, *targets: str) -> dict[str, bytes]:
    """The files of an artifact that a process of its own compiles."""
    folder.mkdir()
    flags = [flag for target in targets for flag in ("--target", target)]
    command = [sys.executable, "-m", "llmc.cli.main", "compile", str(model), "-o", "artifact", "-q", "--context", "64", *flags]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(folder)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    root = folder / "artifact"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# Slow: eight targets twice, and two of them alone.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_compiles_give_the_same_bytes(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model_dir("llama")
    first = compiled(model, tmp_path / "first", "1", *TARGETS)
    second = compiled(model, tmp_path / "another place", "2", *TARGETS)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    # what a variant is does not depend on what it is compiled beside
    alone = compiled(model, tmp_path / "alone", "3", "rocm:gfx942", "cpu:x86-64-v3")
    limits = [json.loads(files["manifest.json"])["limits"] for files in (first, alone)]
    assert limits[0] == limits[1]
    names = [name for name in alone if name.startswith("variants/")]
    assert [name for name in names if alone[name] != first[name]] == []
