"""Artifacts for processors of another kind than this one, run through an emulator of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llmc
from llmc.compiler import compile as compile_model
from llmc.deploy import package
from llmc.targets.cpu import ARM
from tests.support import example, other_processor

COUNT = 8


# Slow: an emulated processor.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_on_an_emulated_aarch64(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Cross-compiled, packaged with the libraries of TVM's wheel, its C example built by zig: the tokens of this machine's variant.

    Needs the Debian packages that tests/support/other_processor.py names.
    """
    emulator = other_processor.emulator()
    artifact = tmp_path / "artifact"
    targets = ["cpu", "cpu:aarch64+dotprod"]
    compile_model(str(smollm2_gguf), out=artifact, target=targets, dtype="float32", context=128)
    with llmc.load(artifact) as model:
        prompt = model.encode("The capital of France is")
        expected = model.generate(prompt, max_tokens=COUNT).token_ids
    out = package(artifact, target=targets[1], out=tmp_path / "package").out
    example.build(out, [sys.executable, "-m", "ziglang", "cc", "-target", ARM, "-Wl,--allow-shlib-undefined"])
    run = [*emulator, "./example", str(COUNT), *map(str, prompt)]
    done = subprocess.run(run, cwd=out, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert [int(t) for t in done.stdout.split()] == expected
