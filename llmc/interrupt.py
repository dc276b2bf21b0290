"""Ctrl-C that is not lost: libraries catch KeyboardInterrupt while they are imported, or make errors of their own of it.

The command line remembers that it was pressed, and a long operation asks before each of its phases.
"""

from __future__ import annotations

import signal
from types import FrameType

_heard = False


def listen() -> None:
    """From now on SIGINT is remembered, besides raising KeyboardInterrupt."""
    forget()
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = True
    raise KeyboardInterrupt


def heard() -> bool:
    """Whether SIGINT came and was not forgotten."""
    return _heard


def forget() -> None:
    """The interrupt was answered: what it was meant to end has ended."""
    global _heard
    _heard = False


def check() -> None:
    """Raise KeyboardInterrupt if SIGINT came and something kept it to itself."""
    if _heard:
        raise KeyboardInterrupt
