"""Tensors that lie in a file as plain numbers, whatever the format around them: mapped when read, gone when dropped."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from llmc.errors import ModelError
from llmc.importer.params import DTYPES


def printable(name: str) -> str:
    """A name from a file that may be damaged, fit for a message: one short line."""
    short = name if len(name) <= 80 else name[:77] + "..."
    return short if short.isprintable() else ascii(short)


def mapped_bytes(file: Path, offset: int, nbytes: int, what: str) -> np.ndarray:
    """``nbytes`` bytes at ``offset`` as uint8, a copy-on-write view of the file: pages come in when touched, and leave when the
    view does. Raises ModelError naming ``what`` if the file has become unreadable."""
    if nbytes == 0:
        return np.empty(0, np.uint8)
    try:
        # np.asarray drops the memmap subclass; the base keeps the mapping alive
        return np.asarray(np.memmap(file, np.uint8, "c", offset, nbytes))
    except (OSError, ValueError) as error:
        raise ModelError(f"{what} cannot be read at byte {offset} of the file ({error})") from error


@dataclass(frozen=True)
class FileTensor:
    """One tensor of plain numbers; ``offset`` in bytes from the start of the file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def scheme(self) -> str:
        return self.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """The tensor as a view of the mapped file, or a copy where the file did not align it."""
        array = mapped_bytes(self.file, self.offset, self.nbytes, self.describe()).view(DTYPES[self.dtype]).reshape(self.shape)
        return array if array.flags.aligned else array.copy()

    def describe(self) -> str:
        return f"{self.file.name}:{printable(self.name)}"
