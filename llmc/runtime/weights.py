"""Map an artifact's weights into memory: safetensors files, no copy, no package.

A file is ``u64 header length | JSON header | tensor data``; the header gives each tensor's dtype, shape and byte range
within the data (https://huggingface.co/docs/safetensors). The mapping is private copy-on-write, which is what makes it
writable in the eyes of NumPy and DLPack; nothing ever writes to it, so its pages stay those of the page cache.
"""

from __future__ import annotations

import json
import mmap
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc.errors import ArtifactError
from llmc.manifest import TensorInfo
from llmc.runtime.tensors import ALIGNMENT, storage_dtype

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_REPAIR = "copy the artifact again or recompile the model"


class WeightFile:
    """One mapped safetensors file. ``entries``: name -> its header entry (``dtype``, ``shape``, ``data_offsets``)."""

    def __init__(self, path: Path) -> None:
        """Map ``path`` and check its header. Raises ArtifactError if the file is missing, truncated or damaged."""
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise ArtifactError(f"the weights {path} are truncated: {size} bytes cannot hold the header: {_REPAIR}")
                header: Any = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ArtifactError(f"the weights {path} cannot be read ({error.strerror or error}): {_REPAIR}") from error
        except ValueError as error:
            raise ArtifactError(f"the weights {path} have a damaged header ({error}): {_REPAIR}") from error
        if not isinstance(header, dict):
            raise ArtifactError(f"the weights {path} have a damaged header (not a JSON object): {_REPAIR}")
        header.pop("__metadata__", None)
        self.entries: dict[str, dict[str, Any]] = header
        self._start = 8 + length
        self._data = size - self._start

    def array(self, name: str) -> tuple[np.ndarray, str]:
        """The tensor's memory as an array of its storage dtype, and its dtype's name (``"bfloat16"``).

        Raises ArtifactError if the entry is missing, contradicts itself, reaches past the end of the file or is not aligned.
        """
        try:
            entry = self.entries[name]
            dtype = _NAMES[entry["dtype"]]
            shape = tuple(int(d) for d in entry["shape"])
            begin, end = (int(v) for v in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the weights {self.path} have no usable entry for {name} ({type(error).__name__}: {error}): {_REPAIR}"
            ) from error
        storage = storage_dtype(dtype)
        if min(shape, default=0) < 0 or begin < 0 or end - begin != prod(shape) * storage.itemsize:
            raise ArtifactError(
                f"the weights {self.path} are damaged: {name} is {dtype} {list(shape)} in bytes {begin} to {end}: {_REPAIR}"
            )
        if end > self._data:
            raise ArtifactError(
                f"the weights {self.path} are truncated: {name} ends at byte {self._start + end} of a file of "
                f"{self._start + self._data} bytes: {_REPAIR}"
            )
        if (self._start + begin) % ALIGNMENT:
            raise ArtifactError(
                f"the weights {self.path} hold {name} at byte {self._start + begin}, not a multiple of {ALIGNMENT}: {_REPAIR}"
            )
        return np.frombuffer(self._map, storage, prod(shape), self._start + begin).reshape(shape), dtype

    def offset(self, name: str) -> int:
        """Where in the file the tensor's bytes start, once :meth:`array` has found it sound."""
        return self._start + int(self.entries[name]["data_offsets"][0])


class Stored(NamedTuple):
    """A weight: its mapped memory, its dtype's name, and the same bytes as a place in a file."""

    array: np.ndarray
    dtype: str
    path: Path
    offset: int


def map_weights(folder: Path, tensors: dict[str, TensorInfo], names: list[str]) -> list[tuple[np.ndarray, str]]:
    """The named weights of the artifact in ``folder``, as (array, dtype name) in order: see :func:`stored_weights`."""
    return [(weight.array, weight.dtype) for weight in stored_weights(folder, tensors, names)]


def stored_weights(folder: Path, tensors: dict[str, TensorInfo], names: list[str]) -> list[Stored]:
    """The named weights of the artifact in ``folder``, in order, each file mapped once; nothing of them is read yet.

    Raises ArtifactError if a file is missing or damaged, or if it does not hold what the manifest says.
    """
    files: dict[str, WeightFile] = {}
    found: list[Stored] = []
    for name in names:
        info = tensors.get(name)
        if info is None:
            raise ArtifactError(f"the manifest of {folder} lists no weight {name}, which its module needs: {_REPAIR}")
        if info.file not in files:
            files[info.file] = WeightFile(folder / info.file)
        array, dtype = files[info.file].array(name)
        if dtype != info.dtype or list(array.shape) != list(info.shape):
            raise ArtifactError(
                f"the weights {folder / info.file} hold {name} as {dtype} {list(array.shape)}, and the manifest says "
                f"{info.dtype} {list(info.shape)}: {_REPAIR}"
            )
        found.append(Stored(array, dtype, files[info.file].path, files[info.file].offset(name)))
    return found
