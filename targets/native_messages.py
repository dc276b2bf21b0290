"""Messages that native code writes to standard error and that say nothing to a user."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

STDERR = 2


@contextmanager
def without(known: Sequence[str]) -> Iterator[None]:
    """Drop the lines that native code writes meanwhile and that hold one of ``known``; others appear at the end. What Python
    writes is not held up."""
    sys.stderr.flush()
    python, saved = sys.stderr, os.dup(STDERR)
    own = sys.__stderr__ if python is sys.__stderr__ else None  # not what a test put in its place
    with tempfile.TemporaryFile() as held, os.fdopen(saved, "wb", buffering=0) as real:
        if own is not None:
            sys.stderr = open(os.dup(saved), "w", encoding=own.encoding, errors=own.errors, buffering=1)  # noqa: SIM115
        os.dup2(held.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(saved, STDERR)
            if own is not None and sys.stderr is not own:
                sys.stderr.close()
                sys.stderr = python
            held.seek(0)
            for line in held.read().splitlines(keepends=True):
                if not any(words.encode() in line for words in known):
                    real.write(line)
