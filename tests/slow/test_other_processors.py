"""Artifacts for processors of another kind than this one, run through an emulator of it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmc
from llmc.compiler import compile as compile_model
from llmc.deploy import package

SYSROOT = Path("/usr/aarch64-linux-gnu")
COUNT = 8


# Slow: an emulated processor.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_on_an_emulated_aarch64(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Cross-compiled, packaged with the libraries of TVM's wheel, its C example built by zig: the tokens of this machine's variant.

    Needs Debian's qemu-user-static, libc6-arm64-cross, libstdc++6-arm64-cross and libgcc-s1-arm64-cross.
    """
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None or not SYSROOT.is_dir():
        pytest.fail("install qemu-user-static, libc6-arm64-cross, libstdc++6-arm64-cross and libgcc-s1-arm64-cross")
    artifact = tmp_path / "artifact"
    targets = ["cpu", "cpu:aarch64+dotprod"]
    compile_model(str(smollm2_gguf), out=artifact, target=targets, dtype="float32", context=128)
    with llmc.load(artifact) as model:
        prompt = model.encode("The capital of France is")
        expected = model.generate(prompt, max_tokens=COUNT).token_ids
    out = package(artifact, target=targets[1], out=tmp_path / "package").out
    text = (out / "example.c").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith(" *   cc ")).partition("cc ")[2]
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu", "-Wl,--allow-shlib-undefined"]
    subprocess.run([*zig, *shlex.split(command)], cwd=out, check=True)
    run = [qemu, "-L", str(SYSROOT), "./example", str(COUNT), *map(str, prompt)]
    done = subprocess.run(run, cwd=out, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert [int(t) for t in done.stdout.split()] == expected
