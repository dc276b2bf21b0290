"""A real artifact, built by hand once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from .module import build_library, write_artifact
from .toy import byte_level_tokenizer, write_tokenizer


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module."""
    path = tmp_path_factory.mktemp("library") / "lib.so"
    build_library(path)
    return path


@pytest.fixture
def artifact(library: Path, tmp_path: Path) -> Path:
    """An artifact folder around the module, free to be damaged."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_artifact(folder, library)
    return folder


@pytest.fixture
def text_artifact(library: Path, tmp_path: Path) -> Path:
    """The same with a tokenizer and a chat template."""
    folder = tmp_path / "text-artifact"
    folder.mkdir()
    write_artifact(folder, library, write_tokenizer(folder, byte_level_tokenizer()))
    return folder
