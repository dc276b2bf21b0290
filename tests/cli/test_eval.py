"""``llmc eval``: a small artifact against its own model, against itself, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Llmc

TEXT = "Nothing is so firmly believed as what we least know. " * 12
"""636 bytes, which the test model's tokenizer makes as many tokens of."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "own.txt"


def test_against_its_own_model(llmc_here: Llmc, tiny_artifact: Path, tiny_model_dir: Callable[..., Path], text: Path) -> None:
    done = llmc_here("eval", tiny_artifact, "--against", tiny_model_dir("llama"), "--text", text, "--window", 64, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["windows"], found["window"], found["tokens"]) == (9, 64, 9 * 63)
    assert found["perplexity"]["low"] <= found["perplexity"]["value"] <= found["perplexity"]["high"]
    assert abs(found["against"]["kl"]["value"]) < 1e-5 and found["against"]["top1"]["value"] > 0.99
    assert found["against"]["ratio"]["value"] == pytest.approx(1, abs=1e-4)


def test_against_itself_in_words(llmc_here: Llmc, tiny_artifact: Path, text: Path) -> None:
    done = llmc_here("eval", tiny_artifact, "--against", tiny_artifact, "--text", text, "--window", 64, "--windows", 4)
    assert done.returncode == 0, done.stderr
    assert "ratio        1.0000  [1.0000, 1.0000]" in done.stdout
    assert "top-1 equal    100.00%  [100.00%, 100.00%]" in done.stdout
    assert "252 tokens in 4 windows of 64" in done.stderr
    assert "reference" not in llmc_here("eval", tiny_artifact, "--text", text, "--window", 64, "--windows", 4).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--text", "nowhere.txt"), 2, "nowhere.txt cannot be read"),
        (("--window", 64, "--windows", 2), 7, "takes 3 windows of text, and there are 2"),
        (("--window", 96, "--against", "nowhere"), 3, "nowhere"),
        (("--windows", "none"), 2, "'none'"),
    ],
)
def test_what_is_refused(
    llmc_here: Llmc, tiny_artifact: Path, text: Path, arguments: tuple[object, ...], status: int, words: str
) -> None:
    given = [*([] if "--text" in arguments else ["--text", text]), *arguments]
    done = llmc_here("eval", tiny_artifact, *given)
    assert done.returncode == status
    assert words in done.stderr and not done.stdout
