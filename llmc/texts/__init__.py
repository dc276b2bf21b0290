"""Texts that models are calibrated and evaluated on: two disjoint ones in the public domain, or the user's own.

The files say where they come from in lines that start with ``#``, which are no part of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmc.errors import RequestError, UsageError

CALIBRATION = Path(__file__).with_name("calibration.txt")
EVALUATION = Path(__file__).with_name("evaluation.txt")


def read_text(path: Path) -> str:
    """The text of a file: UTF-8. Raises UsageError if it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"the text {path} cannot be read ({reason}): give a file of plain text") from error
    if path in (CALIBRATION, EVALUATION):
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")).lstrip()
    if not text.strip():
        raise UsageError(f"the text {path} is empty: give a file of plain text")
    return text


def windows(ids: Sequence[int], length: int, most: int | None = None, bos: int | None = None) -> list[list[int]]:
    """``ids`` cut into disjoint windows of ``length`` tokens; the rest is left out.

    ``most``: take only so many, spread evenly over the text. ``bos``: a token that starts every window, as it starts every text of
    this model; it takes the place of the one that ``ids`` may start with. Raises RequestError if not one window is full.
    """
    if bos is not None:
        ids = ids[1:] if ids and ids[0] == bos else ids
    own = length - (bos is not None)
    count = len(ids) // own if own > 0 else 0
    if not count:
        raise RequestError(f"the text has {len(ids)} tokens and a window {length}: give a longer text or shorter windows")
    taken = range(count) if most is None or most >= count else [i * count // most for i in range(most)]
    return [[*([] if bos is None else [bos]), *ids[i * own : (i + 1) * own]] for i in taken]
