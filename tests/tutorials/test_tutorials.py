"""The tutorials run from top to bottom, as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "tutorials"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_tutorial_runs(script: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model_dir("llama", max_position_embeddings=640)
    done = subprocess.run(
        [sys.executable, script, model],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "are as they were written" in done.stdout and "perplexity" in done.stdout
