"""The tutorials run from top to bottom, as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import quantized_checkpoints as made

FOLDER = Path(__file__).parent.parent.parent / "tutorials"


def run(script: str, model: Path, temporary: Path) -> str:
    """What the script prints for ``model``."""
    done = subprocess.run(
        [sys.executable, FOLDER / script, model],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=temporary,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compile_and_run(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    printed = run("01_compile_and_run.py", tiny_model_dir("llama", max_position_embeddings=640), tmp_path)
    assert "are as they were written" in printed and "perplexity" in printed


def test_quantized_checkpoints(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """On GPTQ with act-order and zero points, which the tutorial compares with transformers."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = tiny_model_dir("llama", num_hidden_layers=1, **sizes)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    replace = made.linears(made.gptq(symmetric=False, act_order=True))
    folder, _ = made.quantize_folder(plain, tmp_path, replace, config)
    printed = run("02_quantized_checkpoints.py", folder, tmp_path)
    assert "4 matrices are stored by int4p_g32" in printed and "'quant_method': 'gptq'" in printed


# Slow: three targets for a model.
@pytest.mark.slow
def test_many_targets(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    printed = run("03_many_targets.py", tiny_model_dir("llama", max_position_embeddings=640), tmp_path)
    assert "opencl:generic, rocm:gfx942: " in printed and "Dockerfile, example.c" in printed


def test_every_tutorial_has_a_test() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {
        "01_compile_and_run.py", "02_quantized_checkpoints.py", "03_many_targets.py",
    }  # fmt: skip
