"""Where llmc keeps what it fetched and compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: ``$LLMC_CACHE``, or ``llmc`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if chosen := os.environ.get("LLMC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmc"


def records_folder() -> Path:
    """The folder for the user's own tuning records: ``records`` in the cache."""
    return cache_root() / "records"
