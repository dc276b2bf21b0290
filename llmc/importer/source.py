"""What every model format is read into: a transformers config, a checkpoint, and a tokenizer that can be written out.

``resolve`` (:mod:`llmc.importer.resolve`) turns the command line's MODEL into one of these; the exporter needs no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmc.importer.params import ParamTable

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: called as a long reading goes on; the units are the step's own (files, bytes)."""


@dataclass
class Binding:
    """How a checkpoint's tensors map to a model's parameters.

    ``table`` has one entry per parameter *and persistent buffer* that the checkpoint provides, by the model's own name
    (``model.layers.0.self_attn.q_proj.weight``). ``missing``: names the model has and the checkpoint lacks (tied ones are in
    ``tied``: name -> the name that holds the data). ``unused``: tensors of the checkpoint that no parameter takes.
    """

    table: ParamTable
    tied: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass
class TokenizerInfo:
    """What the runtime must know beside ``tokenizer.json``. Ids are None where the model has no such token."""

    bos_token_id: int | None
    eos_token_ids: list[int]
    pad_token_id: int | None
    bos_token: str
    eos_token: str
    chat_template: str | None
    vocab_size: int


class ModelSource(Protocol):
    """A model on disk, read far enough to know what it is, with no weight loaded."""

    name: str
    """Short name for people: the folder's or the file's."""
    kind: str
    """``"huggingface"`` or ``"gguf"``."""
    path: Path
    dtype: str
    """The natural storage dtype: the checkpoint's own, or float16 for quantized blocks."""
    config: Any
    """The transformers ``PreTrainedConfig``."""
    license: str | None
    """The licence that the model says it has (``"apache-2.0"``), None if it says nothing."""

    def bind(self, model: Any) -> Binding:
        """Map the checkpoint onto ``model`` (a transformers model on the meta device). Reads headers only.

        Raises ModelError for a tensor whose shape contradicts the model's, naming both shapes and the file.
        """

    def write_tokenizer(self, folder: Path) -> TokenizerInfo | None:
        """Write ``tokenizer.json`` (and ``chat_template.jinja`` if there is one) into ``folder``; None if the model has none."""

    def fingerprint(self) -> str:
        """sha256 hex that changes when the model's content does: config, tensor headers, and the bytes' size and mtime or hash."""
