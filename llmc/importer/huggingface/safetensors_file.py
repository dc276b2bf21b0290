"""One ``.safetensors`` file: its header, and tensors read one at a time through a memory map.

Format: 8 bytes little-endian header length, that many bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the data;
offsets count from the end of the header ("Format" in the README of the safetensors project).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.file_tensor import FileTensor

_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
}
# the reference implementation refuses larger headers too: a wild length is a damaged file, not a big model
_MAX_HEADER = 100_000_000


def _header_bytes(path: Path, size: int) -> tuple[bytes, int]:
    """The header's JSON bytes, and the file offset where data starts."""
    try:
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise ModelError(f"{path} is truncated: {size} bytes, less than the 8 a safetensors header starts with")
            length = int.from_bytes(prefix, "little")
            if length > _MAX_HEADER:
                raise ModelError(f"{path} is not a safetensors file or is damaged: at byte 0 it states a header of {length} bytes")
            if 8 + length > size:
                raise ModelError(
                    f"{path} is truncated: its header ends at byte {8 + length}, and the file has {size}: download it again"
                )
            return stream.read(length), 8 + length
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> FileTensor:
    """The source for one header entry, or ModelError if the entry contradicts itself or the file's size."""
    try:
        stored, shape = str(entry["dtype"]), tuple(int(d) for d in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged: the header entry of tensor {name!r} lacks dtype, shape or data_offsets") from error
    if stored not in _DTYPE_NAMES:
        raise UnsupportedError(
            f"{path.name}:{name} is stored as {stored}, which llmc cannot read: supported are {', '.join(_DTYPE_NAMES)}; "
            "convert the checkpoint to one of them"
        )
    source = FileTensor(path, name, shape, _DTYPE_NAMES[stored], data + begin)
    if min(shape, default=0) < 0 or begin < 0 or end - begin != source.nbytes:
        raise ModelError(f"{path} is damaged: tensor {name!r} of {stored} {list(shape)} is given bytes {begin} to {end}")
    if data + end > size:
        raise ModelError(
            f"{path} is truncated: tensor {name!r} ends at byte {data + end}, and the file has {size}: download it again"
        )
    return source


def read_header(path: Path) -> dict[str, FileTensor]:
    """Every tensor of the file at ``path`` by name; reads the header only.

    Raises ModelError for a truncated or damaged file (with the offset), UnsupportedError for a dtype llmc has no name for.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    raw, data = _header_bytes(path, size)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ModelError(f"{path} is damaged: its header, bytes 8 to {data}, is not JSON ({error})") from error
    if not isinstance(header, Mapping):
        raise ModelError(f"{path} is damaged: its header, bytes 8 to {data}, is not a JSON object")
    return {str(n): _entry(path, str(n), e, data, size) for n, e in header.items() if n != "__metadata__"}
