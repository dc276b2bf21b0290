"""Sizes and times as people write them, and the message for a missing extra."""

import re
from pathlib import Path

import pytest

from llmc import extras, units
from llmc.errors import MissingExtraError, UsageError


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_890_000_000, "4.9 GB"), (999_960, "1.0 MB"), (2_500_000_000_000, "2.5 TB")],
)
def test_bytes(value: int, text: str) -> None:
    assert units.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.5e-4, "850 µs"),
        (0.0123, "12 ms"),
        (0.9999, "1.0 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert units.format_seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(32768, "32K"), (1000, "1000"), (1 << 20, "1M"), (0, "0"), (1023, "1023")])
def test_count(value: int, text: str) -> None:
    assert units.format_count(value) == text
    assert units.parse_count(text) == value


@pytest.mark.parametrize(
    ("value", "text"), [(134_515_008, "135M"), (8_030_261_248, "8.0B"), (940, "940"), (999_700_000, "1.0B"), (52_300, "52K")]
)
def test_parameters(value: int, text: str) -> None:
    assert units.format_parameters(value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GB", 8 * 10**9), ("1.5 GiB", 3 << 29), ("512", 512), (" 2 m ", 2_000_000), ("9007199254740993", 9007199254740993)],
)
def test_parse_bytes(text: str, value: int) -> None:
    assert units.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1", "8 zebras", "1e9", "1,5GB"])
def test_parse_rejects(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        units.parse_bytes(text)


def test_require_names_the_packages_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require("compile", "compiling a model")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("gguf", "ml_dtypes") else object())
    with pytest.raises(MissingExtraError) as error:
        extras.require("compile", "compiling a model")
    assert str(error.value) == 'compiling a model needs gguf, ml-dtypes, not installed here: run `pip install "llmc[compile]"`'


def test_packages_agree_with_setup() -> None:
    text = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    block = re.search(r"COMPILE = \[(.*?)\]", text, re.S)
    assert block is not None
    assert set(re.findall(r'"([a-z0-9-]+)[=>]', block.group(1))) == set(extras.PACKAGES["compile"].values())
