"""A GGUF file as a model source: config, names, tokenizer and weights all come from the one file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llmc.importer.gguf.config import config_values
from llmc.importer.gguf.file import GGUFSource, open_gguf
from llmc.importer.gguf.names import bind_gguf
from llmc.importer.gguf.tokenizer import write_gguf_tokenizer
from llmc.importer.huggingface.config import causal_config, config_from_dict
from llmc.importer.source import Binding, TokenizerInfo

_HEAD = 1 << 20  # bytes from the start that the fingerprint covers: metadata of any model begins there


class GGUFModel:
    """A :class:`~llmc.importer.source.ModelSource` over one file. Opening it reads the metadata and the tensor table."""

    kind = "gguf"

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Raises ModelError or UnsupportedError if the file cannot be compiled from; ``name`` defaults to the file's."""
        self.path = path
        self.name = name or path.stem
        self._file = open_gguf(path)
        self._values = config_values(self._file)
        self.config: Any = causal_config(config_from_dict(self._values, f"the metadata of {path}"), str(path))
        self.dtype = self._natural_dtype()
        named = self._file.metadata.get("general.license")
        self.license = str(named) if named else None

    def _natural_dtype(self) -> str:
        """float16 for quantized blocks, else the narrowest float type in the file (norms are float32 in any file)."""
        sources = self._file.tensors.values()
        if any(isinstance(s, GGUFSource) for s in sources):
            return "float16"
        plain = {s.dtype for s in sources}
        return next((d for d in ("bfloat16", "float16") if d in plain), "float32")

    def bind(self, model: Any) -> Binding:
        """Map the file's tensors onto ``model``; see :func:`~llmc.importer.gguf.names.bind_gguf`."""
        return bind_gguf(self._file, self._values, model)

    def write_tokenizer(self, folder: Path) -> TokenizerInfo | None:
        """See :func:`~llmc.importer.gguf.tokenizer.write_gguf_tokenizer`."""
        return write_gguf_tokenizer(self._file, folder)

    def fingerprint(self) -> str:
        """sha256 hex over the file's first MiB, its tensor table, its size and its mtime."""
        status = self.path.stat()
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        for name, source in self._file.tensors.items():
            digest.update(f"{name} {source.scheme} {source.shape} {source.offset}\n".encode())
        with self.path.open("rb") as stream:
            digest.update(stream.read(_HEAD))
        return digest.hexdigest()
