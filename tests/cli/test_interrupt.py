"""``llmc/interrupt.py``: Ctrl-C ends a command even where a library keeps it to itself or makes another error of it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from llmc import interrupt
from llmc.cli import doctor, main
from llmc.progress import Clock, SilentProgress


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    interrupt.forget()


def test_a_swallowed_interrupt_ends_the_next_phase() -> None:
    interrupt.listen()
    clock = Clock(SilentProgress())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), clock.phase("weights"):
        pytest.fail("the phase began")
    interrupt.forget()
    with clock.phase("weights"):
        pass


def test_another_error_made_of_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def action(_: object) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("an import failed")

    monkeypatch.setattr(doctor, "main", action)
    assert main.main(["doctor"]) == main.INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted\n"
