"""What ``--quant int8`` means on a CPU without more being said: groups of 32, and activations made fit for 8 bits first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import llmc
from llmc import manifest, targets
from llmc.errors import UsageError
from llmc.settings import default_method, settings_from

CPU, GPU = targets.parse("cpu:x86-64-v3"), targets.parse("opencl:generic")


@pytest.mark.parametrize(
    ("quant", "chosen", "method"),
    [
        ("int8", [CPU], "smoothquant"),
        ("int8", [GPU, CPU], "smoothquant"),
        ("int8_row", [CPU], "smoothquant"),
        ("w8a8", [CPU], "smoothquant"),
        ("int8", [GPU], "rtn"),
        ("int4", [CPU], "rtn"),
        ("fp8_e4m3", [CPU], "rtn"),
        ("none", [CPU], "rtn"),
        (None, [CPU], "rtn"),
    ],
)
def test_the_method_without_a_name(quant: str | None, chosen: list[targets.Target], method: str) -> None:
    assert default_method(quant, chosen) == method


@pytest.fixture(scope="module")
def tied(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("qwen2", tie_word_embeddings=True)


def compiled(model: Path, out: Path, **options: object) -> tuple[dict[str, object], dict[str, tuple[str, str]]]:
    """The options in the manifest, and of every matrix its scheme and what else the report says."""
    llmc.compile(str(model), out=out, target=CPU.name, context=64, **options)  # type: ignore[arg-type]
    report = json.loads((out / "report.json").read_text())
    return manifest.read(out).options, {row["name"]: (row["scheme"], row["reason"]) for row in report["weights"]}


def test_a_plain_int8_is_smoothed_and_in_groups(tied: Path, tmp_path: Path) -> None:
    options, stored = compiled(tied, tmp_path / "out", quant="int8")
    assert (options["quant"], options["method"]) == ("int8", "smoothquant") and "calibration" not in options
    assert stored["model.embed_tokens.weight"] == ("int8_g32", "smoothquant")
    assert stored["model.layers.*.mlp.down_proj.weight"] == ("int8_g32", "smoothquant")
    assert stored["model.layers.*.self_attn.o_proj.weight"] == ("int8_g32", "")  # it would take an operator


def test_a_model_without_a_tokenizer_is_rounded(tied: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(tied, mute)
    for file in mute.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        compiled(mute, tmp_path / "none", quant="int8", method="smoothquant")
    options, stored = compiled(mute, tmp_path / "out", quant="int8_row")
    assert options["quant"] == "int8_row" and "method" not in options
    assert stored["model.layers.*.mlp.down_proj.weight"] == ("int8", "")


@pytest.mark.slow
def test_a_variant_that_is_added_is_smoothed_alike_unless_by_a_text_of_the_users(tied: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    compiled(tied, out, quant="int8")
    before = set(manifest.read(out).tensors)
    llmc.add(out, target="cpu:x86-64-v2")
    assert set(manifest.read(out).tensors) == before, "the same bytes"
    text.write_text("abcdefgh " * 100, encoding="utf-8")
    compiled(tied, tmp_path / "other", quant="int8", calibration=text)
    with pytest.raises(UsageError, match="depends on a text that the artifact does not hold"):
        settings_from(manifest.read(tmp_path / "other"))
