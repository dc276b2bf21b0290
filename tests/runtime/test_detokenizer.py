"""Streamed text is the tokenizer's own, in whole characters, and ends exactly before a stop string."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmc.runtime.detokenizer import Detokenizer, StopStrings
from llmc.runtime.tokenizer import Tokenizer

from .toy import byte_level_tokenizer, sentencepiece_tokenizer, write_tokenizer

TEXTS = [
    "hello world",
    "  two  spaces ",
    "naïve café",
    "中文。ab 中",
    "😀👩‍👩‍👧‍👦 ok",
    "\n\nline\n",
    "a\ufffdb",
    "hello 😀😀😀",
    "🏳️‍🌈" * 6,
]


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    made = byte_level_tokenizer() if request.param == "byte_level" else sentencepiece_tokenizer()
    return Tokenizer(tmp_path, write_tokenizer(tmp_path, made))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_continue_the_prompt(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text * 3, add_special_tokens=False)
    for cut in range(len(whole)):
        detokenizer = Detokenizer(tokenizer, whole[:cut])
        seen = next((n for n in range(cut, max(cut - 4, 0), -1) if not tokenizer.decode(whole[:n]).endswith("\ufffd")), 0)
        after = "".join(detokenizer.push(i) for i in whole[cut:])
        assert tokenizer.decode(whole[:seen]) + after == text * 3 or "\ufffd" in text


def test_special_tokens_are_no_text_and_cost_no_space(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    start, end = tokenizer.encode("", add_special_tokens=True), tokenizer.files.eos_token_ids
    ids = [*start, *tokenizer.encode("a b", add_special_tokens=False), *end]
    tail = tokenizer.encode("a b", add_special_tokens=False)
    text = "".join(detokenizer.push(i) for i in [*ids, *tail])
    assert text == tokenizer.decode([*ids, *tail])


def test_an_unfinished_character_is_never_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab😀", add_special_tokens=False)
    for cut in range(len(ids)):
        detokenizer = Detokenizer(tokenizer)
        assert "".join(detokenizer.push(i) for i in ids[:cut]) == tokenizer.decode(ids[:cut]).rstrip("\ufffd")


def test_garbage_bytes_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tmp_path, write_tokenizer(tmp_path, byte_level_tokenizer()))
    longest = 0
    decode = tokenizer.decode

    def watched(ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", watched)
    rng = random.Random(3)
    broken = [i for i in range(2, 258) if tokenizer.decode([i]) == "\ufffd"]
    ids = [rng.choice(broken) for _ in range(400)]
    ids += tokenizer.encode(" ok 😀", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(i) for i in ids)
    assert text == decode(ids)
    assert longest < 64


def test_random_tokens_give_the_tokenizers_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tmp_path, write_tokenizer(tmp_path, byte_level_tokenizer()))
    rng = random.Random(8)
    for _ in range(200):
        ids = [rng.randrange(2, tokenizer.vocab_size) for _ in range(rng.randrange(1, 60))]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.push(i) for i in ids)
        assert text == tokenizer.decode(ids).rstrip("\ufffd")[: len(text)] or tokenizer.decode(ids).startswith(text)
        assert len(text) >= len(tokenizer.decode(ids).rstrip("\ufffd"))


def split(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    """Feed ``text`` cut at ``cuts`` to a StopStrings; what it let through, and whether it stopped."""
    matcher = StopStrings(stops)
    shown = ""
    edges = [0, *cuts, len(text)]
    for a, b in pairwise(edges):
        piece, found = matcher.push(text[a:b])
        shown += piece
        if found:
            return shown, True
    return shown + matcher.flush(), False


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("one END two", ["END"], ("one ", True)),
        ("one EN", ["END"], ("one EN", False)),
        ("aaab", ["aab"], ("a", True)),
        ("abcabd", ["abd"], ("abc", True)),
        ("x\n\nUser: hi", ["User:", "\n\n"], ("x", True)),
        ("aXbY", ["Y", "Xb"], ("a", True)),
        ("nothing here", ["END", "\n"], ("nothing here", False)),
        ("END", ["END"], ("", True)),
        ("abababac", ["ababac"], ("ab", True)),
    ],
)
def test_stop_strings_however_they_are_cut(text: str, stops: list[str], want: tuple[str, bool]) -> None:
    rng = random.Random(1)
    cases: list[list[int]] = [[], list(range(1, len(text)))]
    cases += [sorted(rng.sample(range(1, len(text)), min(len(text) - 1, 2))) for _ in range(20)]
    for cuts in cases:
        assert split(text, stops, cuts) == want, cuts


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopStrings(["<end>"])
    shown: list[Any] = [matcher.push(p)[0] for p in ("a", " <", "en", "x", "y")]
    assert shown == ["a", " ", "", "<enx", "y"]
