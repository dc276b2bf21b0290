"""Write the files of an artifact, independently of the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], changes: dict[str, dict[str, Any]] | None = None) -> None:
    """A safetensors file whose tensors start at multiples of 64, holes filled by ``__pad`` tensors; ``changes`` falsify entries."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in arrays.items():
        if len(data) % 64:
            hole = 64 - len(data) % 64
            header[f"__pad{len(header)}"] = {"dtype": "U8", "shape": [hole], "data_offsets": [len(data), len(data) + hole]}
            data += bytes(hole)
        end = len(data) + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(data), end]}
        header[name].update((changes or {}).get(name, {}))
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
