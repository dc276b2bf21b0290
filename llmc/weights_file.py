"""Writing weights: safetensors files whose tensors all start 64-byte aligned, streamed one tensor at a time.

The format wants tensors back to back (no holes), and kernels want aligned operands, so odd sizes are followed by a small
``__pad`` tensor. Sizes are known before any weight is read: the header goes first, and nothing is held but the tensor at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from llmc.errors import ModelError
from llmc.importer.finite import check_finite
from llmc.importer.params import DTYPES, Param, ParamTable
from llmc.manifest import FileInfo, TensorInfo
from llmc.runtime.weights import Stored

ALIGNMENT = 64
SHARD_BYTES = 4 << 30
_TAGS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "int64": "I64",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Held:
    """A :class:`~llmc.importer.params.Source` over a weight that an artifact stores: the same bytes once more."""

    weight: Stored
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.info.shape)

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def scheme(self) -> str:
        return self.info.source

    def read(self) -> np.ndarray:
        return self.weight.array.view(DTYPES[self.info.dtype])

    def describe(self) -> str:
        return str(self.weight.path)


@dataclass
class Written:
    """What was written: per tensor where it is, per file its size and hash; paths are relative to the artifact."""

    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]


def write_weights(table: ParamTable, root: Path, folder: str, advance: Callable[[int, str], None], first: int = 1) -> Written:
    """Stream every parameter of ``table`` into ``root/folder/weights-NNNNN.safetensors``, in its stored dtype.

    Files are numbered from ``first``. ``advance(nbytes, name)`` is called after each tensor. Raises ModelError for a NaN or
    infinite weight, or one that does not fit the stored dtype; OSError where the disk refuses.
    """
    (root / folder).mkdir(parents=True, exist_ok=True)
    written = Written({}, {})
    for number, params in enumerate(_shards(table), start=first):
        relative = f"{folder}/weights-{number:05d}.safetensors"
        written.files[relative] = _write_file(root / relative, params, advance)
        for param in params:
            written.tensors[param.name] = TensorInfo(
                relative, param.dtype, list(param.shape), param.scheme or param.dtype, param.source.scheme
            )
    return written


def _shards(table: ParamTable) -> Iterator[list[Param]]:
    """Parameters in order, cut into files of about ``SHARD_BYTES``."""
    shard: list[Param] = []
    size = 0
    for param in table.values():
        if shard and size + param.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(param)
        size += param.nbytes
    if shard:
        yield shard


def _header(params: list[Param]) -> bytes:
    """The length-prefixed JSON header, padded with spaces so that the data after it is aligned."""
    entries: dict[str, object] = {}
    offset = 0

    def place(name: str, tag: str, shape: list[int], nbytes: int) -> None:
        nonlocal offset
        entries[name] = {"dtype": tag, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes

    for param in params:
        place(param.name, _TAGS[param.dtype], list(param.shape), param.nbytes)
        if pad := -param.nbytes % ALIGNMENT:
            place(f"__pad.{param.name}", "U8", [pad], pad)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, params: list[Param], advance: Callable[[int, str], None]) -> FileInfo:
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as stream:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            stream.write(data)
            digest.update(data)
            size += len(data)

        put(_header(params))
        for param in params:
            array = stored(param)
            put(array.reshape(-1).view(np.uint8).data)
            put(bytes(-param.nbytes % ALIGNMENT))
            advance(param.nbytes, param.name)
            del array
    return FileInfo(size, digest.hexdigest())


def stored(param: Param) -> np.ndarray:
    """The parameter's values in its stored dtype, checked: contiguous, of ``param.shape``."""
    array = param.source.read()
    if tuple(array.shape) != param.shape or prod(array.shape) != prod(param.shape):
        raise ModelError(f"{param.source.describe()} gave shape {list(array.shape)} where {list(param.shape)} was announced")
    check_finite(array, param.source)
    dtype = DTYPES[param.dtype]
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if param.dtype == "float16" and not np.isfinite(narrow).all():
        top = float(np.abs(array).max())
        raise ModelError(
            f"{param.source.describe()} holds values up to {top:.4g}, beyond float16's 65504: "
            "compile with --dtype bfloat16 or float32"
        )
    return narrow
