"""The command line as its users meet it: a process with arguments, two streams and an exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.cli.main import main
from llmc.manifest import (
    FileInfo,
    FunctionInfo,
    KernelChoice,
    KvInfo,
    KvLayer,
    Limits,
    Manifest,
    ModelInfo,
    TensorInfo,
    Variant,
)
from llmc.version import __version__

Llmc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cli_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile cache that all tests of the command line share."""
    return tmp_path_factory.mktemp("cli-cache")


@pytest.fixture(scope="session")
def llmc(cli_cache: Path) -> Llmc:
    """``llmc("run", "model", "text")``: the finished process, its output as text. ``env`` adds to the environment."""

    def call(
        *arguments: object, stdin: str | None = None, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmc.cli.main", *map(str, arguments)],
            input="" if stdin is None else stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
            env={**os.environ, "LLMC_CACHE": str(cli_cache), "HF_HUB_OFFLINE": "1", **(env or {})},
        )

    return call


@pytest.fixture
def llmc_here(cli_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Llmc:
    """As ``llmc``, but in this process, which has imported the compiler once: for the many commands that need it."""
    monkeypatch.setenv("LLMC_CACHE", str(cli_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LLMC_DEBUG", raising=False)

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = [*map(str, arguments)]
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                status = main(argv)
            except SystemExit as end:
                status = int(end.code or 0)
        for stream in streams:
            stream.seek(0)
        return subprocess.CompletedProcess(argv, status, streams[0].read(), streams[1].read())

    return call


@pytest.fixture(scope="session")
def tiny_artifact(llmc: Llmc, tiny_model_dir: Callable[..., Path], made_once: Callable[..., Path]) -> Path:
    """A small model compiled for this machine by the command line, in float32 with a context of 96. Do not change it."""

    def make(out: Path) -> None:
        done = llmc("compile", tiny_model_dir("llama"), "-o", out, "--dtype", "float32", "--context", "96")
        assert done.returncode == 0, done.stderr

    return made_once("tiny", make)


def make_manifest(files: dict[str, bytes]) -> Manifest:
    """A manifest with round numbers: 3 layers of 2 × (4 + 4) float16, two of them in a window of 9; 8192 bytes of workspace."""
    kernels = [
        KernelChoice("decode", "llmc.linear", "linear_1", "cpu.linear", 21, "n,64 -> 96", {}, "rows of 64 fill the registers"),
        KernelChoice("extend", "llmc.attend", "attend_1", "cpu.attend", 3, "n,4,4", {}, "the only family"),
    ]
    functions = [FunctionInfo("decode", 400, 7, [400]), FunctionInfo("extend", 4096, 9, [96, 4000])]
    lib = "variants/cpu/lib.so"
    return Manifest(
        llmc=__version__,
        tvm="0.27.0",
        model=ModelInfo("tiny", "models/tiny", "f" * 64, "TinyForCausalLM", 1234567, 99, 4096, 8192),
        kv=KvInfo(16, "float16", [KvLayer(2, 4, 4), KvLayer(2, 4, 4, 9), KvLayer(2, 4, 4, 9)]),
        limits=Limits(8, 512, 128),
        graph_sha256="a" * 64,
        options={"dtype": "float16"},
        variants=[
            Variant("cpu", "cpu:x86-64-v3", "cpu", "x86_64-linux-gnu", "x86-64-v3", ["avx2"], lib, functions, ["w"], kernels)
        ],
        tensors={"w": TensorInfo("weights/weights-00001.safetensors", "float16", [99, 64], "float16", "Q4_1")},
        tokenizer=None,
        files={name: FileInfo(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact folder that is whole as far as its manifest goes; nothing in it can run."""
    files = {"variants/cpu/lib.so": b"machine code" * 10, "weights/weights-00001.safetensors": bytes(range(256)) * 40}
    folder = tmp_path / "artifact"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(data)
    save(folder, make_manifest(files))
    return folder


def save(folder: Path, manifest: Manifest, **changes: object) -> None:
    """Write ``manifest`` with ``changes`` into ``folder``."""
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, **changes).to_json(), encoding="utf-8")
