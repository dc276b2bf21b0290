"""Text to token ids and back, by the artifact's ``tokenizer.json``."""

from __future__ import annotations

import ctypes
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from llmc.errors import ArtifactError
from llmc.manifest import TokenizerFiles


def _return_freed_memory() -> None:
    """Give the pages that parsing the file used back to the system (8 MB for a vocabulary of 49K); glibc keeps them otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Tokenizer:
    """A model's tokenizer. The file is read on first use, so that running on token ids never pays for it."""

    def __init__(self, folder: Path, files: TokenizerFiles) -> None:
        self._path = folder / files.file
        self.files = files

    @cached_property
    def backend(self) -> Any:
        """The ``tokenizers.Tokenizer``. Raises ArtifactError if its file cannot be read."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(self._path))
        except Exception as error:  # the package raises plain Exception for all that can be wrong with a file
            raise ArtifactError(f"the tokenizer {self._path} cannot be read ({error}): recompile the model") from error
        backend.no_truncation()
        backend.no_padding()
        _return_freed_memory()
        return backend

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which stand for no text."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens among them."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``. With ``add_special_tokens`` its post-processor adds what the model expects (a BOS token, mostly)."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 come out as U+FFFD."""
        return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """The vocabulary's entry for an id (``"Ġthe"``), or ``"<id>"`` for an id it does not have."""
        found = self.backend.id_to_token(token_id)
        return f"<{token_id}>" if found is None else str(found)
