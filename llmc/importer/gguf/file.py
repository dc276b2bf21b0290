"""A GGUF file: metadata and tensor table through a memory map, and sources that read one tensor.

Format (little-endian): ``GGUF``, u32 version, u64 tensor count, u64 key count, the key-value pairs, the tensor table, padding to
``general.alignment``, the data. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Parsed here because the gguf package's reader keeps every vocabulary entry as arrays of its own (seconds for 100k tokens).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.file_tensor import FileTensor, mapped_bytes, printable
from llmc.importer.gguf.blocks import BLOCK_TYPES, dequantize
from llmc.importer.gguf.quantized import unpack
from llmc.importer.params import DTYPES
from llmc.passes.quantize.scheme import QuantizedTensor

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# ggml_type numbers (ggml.h) of the plain types and of the block types llmc decodes
_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16", 28: "float64", 24: "int8", 25: "int16", 26: "int32", 27: "int64"}
_BLOCKS = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
}
_OTHER = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class GGUFSource:
    """A tensor stored in blocks of the type ``scheme``; its values are float32, its stored bytes stay reachable."""

    file: Path
    name: str
    shape: tuple[int, ...]
    scheme: str
    offset: int

    @property
    def dtype(self) -> str:
        return "float32"

    @property
    def bytes_per_row(self) -> int:
        kind = BLOCK_TYPES[self.scheme]
        return self.shape[-1] // kind.elements * kind.bytes

    def blocks(self) -> np.ndarray:
        """The stored bytes, uint8 ``[*shape[:-1], bytes_per_row]``: a view of the mapped file."""
        rows = self.shape[:-1]
        raw = mapped_bytes(self.file, self.offset, prod(rows) * self.bytes_per_row, self.describe())
        return raw.reshape(*rows, self.bytes_per_row)

    @property
    def quantization(self) -> str:
        """The scheme's name; vectors have none."""
        return self.scheme.lower() if len(self.shape) > 1 else ""

    def quantized(self) -> QuantizedTensor:
        """The matrix with its codes, bit for bit; the rows of a stack of matrices one below the other."""
        return unpack(self.blocks().reshape(-1, self.bytes_per_row), self.scheme)

    def read(self) -> np.ndarray:
        """The values, float32."""
        return dequantize(self.blocks(), self.scheme)

    def describe(self) -> str:
        return f"{self.file.name}:{printable(self.name)}"


@dataclass(frozen=True)
class GGUFFile:
    """The parsed head of a file. ``metadata``: Python values; strings, numbers, and lists of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, FileTensor | GGUFSource]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def _quoted(name: str) -> str:
    return f"'{printable(name)}'"


class _Cursor:
    """A reading position in the mapped file. Everything raises ModelError past the end, with the offset."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def truncated(self, what: str) -> ModelError:
        return ModelError(
            f"{self.path} is truncated: {what} at byte {self.at} runs past its {len(self.data)} bytes: download it again"
        )

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(layout, self.data, self.at)
        except struct.error as error:
            raise self.truncated(what) from error
        self.at += struct.calcsize(layout)
        return values

    def string(self, what: str) -> str:
        (length,) = self.unpack("<Q", what)
        if length > len(self.data) - self.at:
            raise self.truncated(f"{what} of {length} bytes")
        raw = self.data[self.at : self.at + length]
        self.at += length
        # some converters cut names in the middle of a character; the vocabulary itself is always valid
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"the value of {_quoted(key)}")
        if kind == _ARRAY:
            element, count = self.unpack("<IQ", f"the array {_quoted(key)}")
            if count > len(self.data) - self.at:
                raise self.truncated(f"the array {_quoted(key)} of {count} elements")
            if element in _SCALARS:
                return list(self.unpack(f"<{count}{_SCALARS[element][1]}", f"the array {_quoted(key)}"))
            return [self.value(element, key) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(
                f"{self.path} is damaged: the metadata key {_quoted(key)} at byte {self.at} has the unknown type {kind}"
            )
        return self.unpack(_SCALARS[kind], f"the value of {_quoted(key)}")[0]


def _check_version(path: Path, cursor: _Cursor) -> None:
    magic, version = cursor.unpack("<4sI", "the file's start")
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        kind = "big-endian" if swapped else f"version {version}"
        raise UnsupportedError(
            f"{path} is a {kind} GGUF file, and llmc reads little-endian versions 2 and 3: convert the model again"
        )


def _table(cursor: _Cursor, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """name, shape (outermost first), ggml type and offset (from the start of the data) of every tensor."""
    rows = []
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}")
        (rank,) = cursor.unpack("<I", f"tensor {_quoted(name)}")
        if rank > 8:
            raise ModelError(f"{cursor.path} is damaged: tensor {_quoted(name)} has {rank} dimensions at byte {cursor.at}")
        *dims, kind, offset = cursor.unpack(f"<{rank}QIQ", f"tensor {_quoted(name)}")
        rows.append((name, tuple(reversed(dims)), kind, offset))
    return rows


def _refuse_types(path: Path, rows: list[tuple[str, tuple[int, ...], int, int]]) -> None:
    """UnsupportedError naming the tensors of every type llmc cannot decode, all at once."""
    names: dict[str, list[str]] = {}
    for name, _, kind, _ in rows:
        if kind not in _PLAIN and kind not in _BLOCKS:
            names.setdefault(_OTHER.get(kind, f"ggml type {kind}"), []).append(name)
    if names:
        parts = []
        for kind_name, tensors in names.items():
            more = f" and {len(tensors) - _NAMES_SHOWN} more" if len(tensors) > _NAMES_SHOWN else ""
            parts.append(f"{kind_name} ({', '.join(map(printable, tensors[:_NAMES_SHOWN]))}{more})")
        raise UnsupportedError(
            f"{path} stores tensors in block types llmc cannot read: {'; '.join(parts)}. Use a file with "
            f"{', '.join(BLOCK_TYPES)}, F16, BF16 or F32 tensors"
        )


def _source(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int, size: int) -> FileTensor | GGUFSource:
    source: FileTensor | GGUFSource
    if kind in _PLAIN:
        source = FileTensor(path, name, shape, _PLAIN[kind], start)
        nbytes = prod(shape) * DTYPES[source.dtype].itemsize
    else:
        source = GGUFSource(path, name, shape, _BLOCKS[kind], start)
        block = BLOCK_TYPES[source.scheme].elements
        if not shape or shape[-1] % block:
            raise ModelError(
                f"{path} is damaged: tensor {_quoted(name)} of {source.scheme} is {list(shape)}, rows of no multiple of {block}"
            )
        nbytes = prod(shape[:-1]) * source.bytes_per_row
    if start + nbytes > size:
        raise ModelError(
            f"{path} is truncated: tensor {_quoted(name)} takes bytes {start} to {start + nbytes}, and the file has {size}: "
            "download it again"
        )
    return source


def open_gguf(path: Path) -> GGUFFile:
    """Parse the head of the file at ``path``; no tensor data is read.

    Raises ModelError for a file that is truncated, damaged or no GGUF (with the offset), UnsupportedError for versions, split
    files and block types llmc does not read.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{path} is empty: download it again")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            _check_version(path, cursor)
            tensor_count, key_count = cursor.unpack("<QQ", "the counts")
            metadata: dict[str, Any] = {}
            for index in range(key_count):
                key = cursor.string(f"metadata key {index}")
                (kind,) = cursor.unpack("<I", f"the type of {_quoted(key)}")
                metadata[key] = cursor.value(kind, key)
            rows = _table(cursor, tensor_count)
            end = cursor.at
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelError(f"{path} has no general.architecture in its metadata: it is not a language model")
    if metadata.get("split.count", 0) > 1:
        raise UnsupportedError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']}: "
            "join the parts with `llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    _refuse_types(path, rows)
    alignment = int(metadata.get("general.alignment", 32))
    if alignment <= 0:
        raise ModelError(f"{path} is damaged: its general.alignment is {alignment}")
    data_start = -(-end // alignment) * alignment
    tensors = {name: _source(path, name, shape, kind, data_start + offset, size) for name, shape, kind, offset in rows}
    return GGUFFile(path, metadata, tensors)
