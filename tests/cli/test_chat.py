"""The conversation of ``llmc chat``, with a stand-in for the model that shows what it was asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from llmc.cli import chat
from llmc.cli.main import build_parser
from llmc.errors import RequestError
from llmc.runtime.results import Event


class Echo:
    """Answers "one two three", a word an event; notes the messages it was given and whether its events were closed."""

    manifest = SimpleNamespace(model=SimpleNamespace(name="echo"))

    def __init__(self, interrupt_after: int | None = None, refuse: str | None = None) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.closed = 0
        self._interrupt_after = interrupt_after
        self._refuse = refuse

    def generate(self, messages: list[dict[str, str]], *, stream: bool, **sampling: Any) -> Iterator[Event]:
        self.asked.append([dict(m) for m in messages])
        if messages[-1]["content"] == self._refuse:
            raise RequestError("the prompt has 900 tokens and the context is 96: shorten it")
        return self._events()

    def _events(self) -> Iterator[Event]:
        try:
            for i, word in enumerate(("one ", "two ", "three")):
                if i == self._interrupt_after:
                    raise KeyboardInterrupt
                yield Event(0, 0, [i], word, finish_reason="stop" if i == 2 else None, prompt_tokens=5)
        finally:
            self.closed += 1


def talk(model: Echo, lines: list[str], monkeypatch: pytest.MonkeyPatch, *flags: str, terminal: bool = True) -> None:
    """Type ``lines``, then Ctrl-D."""
    args: argparse.Namespace = build_parser("chat").parse_args(["chat", "m", *flags])
    typed = iter(lines)

    def read(prompt: str) -> str:
        assert prompt == ("> " if terminal else "")
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: terminal))
    chat._converse(model, args)  # type: ignore[arg-type]


def test_turns_are_remembered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Echo()
    talk(model, ["hello", "", "  again "], monkeypatch, "--system", "be brief")
    system = {"role": "system", "content": "be brief"}
    first = [system, {"role": "user", "content": "hello"}]
    second = [*first, {"role": "assistant", "content": "one two three"}, {"role": "user", "content": "again"}]
    assert model.asked == [first, second] and model.closed == 2
    captured = capsys.readouterr()
    assert captured.out == "one two three\n" * 2 and "5 tokens in" in captured.err


def test_reset_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    talk(model, ["hello", "/reset", "again", "/exit", "never"], monkeypatch, "--system", "s", "-q")
    assert [len(m) for m in model.asked] == [2, 2]


def test_an_interrupt_ends_the_answer_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Echo(interrupt_after=2)
    talk(model, ["hello", "again"], monkeypatch, "-q")
    assert model.asked[1][1] == {"role": "assistant", "content": "one two "} and model.closed == 2
    assert capsys.readouterr().out == "one two \n" * 2


def test_an_interrupt_without_a_terminal_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo(interrupt_after=1)
    with pytest.raises(KeyboardInterrupt):
        talk(model, ["hello", "again"], monkeypatch, terminal=False)
    assert len(model.asked) == 1 and model.closed == 1


def test_a_refused_turn_is_forgotten(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Echo(refuse="too long")
    talk(model, ["hello", "too long", "again"], monkeypatch)
    assert [m["content"] for m in model.asked[2]] == ["hello", "one two three", "again"]
    assert "the context is 96" in capsys.readouterr().err
