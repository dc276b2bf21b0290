"""Text out of a stream of tokens: whole characters only, and nothing of a stop string.

Decoding a token alone is wrong: a character may span tokens, and many decoders treat the first token unlike the others (a
leading space is dropped). So the last few tokens are decoded together, once with and once without the new one, and the text
between is new. The work per token does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from llmc.runtime.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST = 4
"""Bytes of the longest UTF-8 character, hence the most tokens that one may span."""
_PATIENCE = 16
"""Tokens without a whole character after which the bytes are taken for garbage rather than for a character yet to come."""


class Detokenizer:
    """Turns tokens into text, one at a time. The pieces joined are the text that follows the prompt's.

    Bytes that can no longer become a character come out as U+FFFD; an unfinished character at the very end never does.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """``prompt``: the tokens before the first one; they decide whether it starts with its space."""
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        tail = [t for t in prompt[-4 * _PATIENCE :] if t not in self._special][-_PATIENCE:]
        start, end = self._clean_cut(tail)
        self._window = tail[start:]
        self._clean = end - start
        self._emitted = len(self._decode(tail[start:end]))

    def _clean_cut(self, tail: list[int]) -> tuple[int, int]:
        """The part of the prompt's tail that is whole characters: it may start within one, being a tail, and end within one if
        the prompt came as ids (nothing was seen of that one yet). Of the possible cuts, the first that decodes best."""
        starts = range(_LONGEST if len(tail) == _PATIENCE else 1)
        ends = range(len(tail), max(len(tail) - _LONGEST, -1), -1)
        best, fewest = (0, len(tail)), len(tail) * _LONGEST
        for start, end in product(starts, ends):
            broken = self._decode(tail[start:end]).count(_REPLACEMENT)
            if broken < fewest:
                best, fewest = (start, end), broken
            if not broken:
                break
        return best

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids) if ids else ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished, and for special tokens."""
        if token in self._special:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        if len(whole) == len(text):
            piece = text[self._emitted :]
            # what came before the last clean cut is no longer needed; from there on is context for the next token
            self._window = self._window[self._clean :]
            self._clean = len(self._window)
            self._emitted = len(self._decode(self._window))
        elif len(self._window) - self._clean > _PATIENCE:
            # all but the last U+FFFD are beyond repair
            piece = text[self._emitted : -1]
            self._window = self._window[-_LONGEST:]
            self._clean = 0
            self._emitted = max(len(self._decode(self._window)) - 1, 0)
        else:
            piece = whole[self._emitted :]
            self._emitted = max(self._emitted, len(whole))
        return piece


class StopStrings:
    """Ends a text before the first of several strings, however they are cut into pieces."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is now certain not to belong to a stop string, and whether one was found (the text before it then)."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = min((at for at in (text.find(s) for s in self._stops) if at >= 0), default=-1)
        if found >= 0:
            self._held = ""
            return text[:found], True
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a start of ``stop``, and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
