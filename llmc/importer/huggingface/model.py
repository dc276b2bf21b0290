"""A model in Hugging Face's layout: a folder with ``config.json``, safetensors weights and a tokenizer."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from llmc.importer.binding import bind_sources
from llmc.importer.huggingface.checkpoint import Checkpoint, natural_dtype, open_checkpoint
from llmc.importer.huggingface.config import CONFIG, load_config, load_quantization
from llmc.importer.huggingface.quantized import quantized_sources
from llmc.importer.huggingface.quantized.modules import QuantizedWeight
from llmc.importer.huggingface.tokenizer import write_folder_tokenizer
from llmc.importer.params import Source, Swapped
from llmc.importer.source import Binding, Progress, TokenizerInfo


class HuggingFaceModel:
    """A :class:`~llmc.importer.source.ModelSource` over a folder. Opening it reads the config and the tensor headers."""

    kind = "huggingface"

    def __init__(self, folder: Path, name: str | None = None, progress: Progress | None = None) -> None:
        """Raises ModelError or UnsupportedError if the folder cannot be compiled from; ``name`` defaults to the folder's."""
        self.path = folder
        self.name = name or folder.resolve().name
        self.config: Any
        self.config, self._is_text_part = load_config(folder)
        self._checkpoint: Checkpoint = open_checkpoint(folder, progress)
        quantization = load_quantization(folder)
        self._sources: dict[str, Source] = quantized_sources(quantization, self._checkpoint.tensors, str(folder))
        self.dtype = natural_dtype(self._sources.values())
        self.license = _license(folder)

    def bind(self, model: Any) -> Binding:
        """Map the checkpoint onto ``model`` by transformers' conversion rules; see :func:`~llmc.importer.binding.bind_sources`."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        transforms = get_model_conversion_mapping(model)
        if self._is_text_part:
            # how multimodal checkpoints of transformers 5 and of 4 nest the text model that is loaded alone here
            base = model.base_model_prefix
            nested = ((rf"^{base}\.language_model\.", f"{base}."), (r"^language_model\.(?=lm_head\.|model\.)", ""))
            transforms = [WeightRenaming(old, new) for old, new in nested] + transforms
        return bind_sources(model, _turned(self._sources, model), transforms, str(self.path))

    def write_tokenizer(self, folder: Path) -> TokenizerInfo | None:
        """See :func:`~llmc.importer.huggingface.tokenizer.write_folder_tokenizer`."""
        return write_folder_tokenizer(self.path, folder)

    def fingerprint(self) -> str:
        """sha256 hex over config.json and :meth:`Checkpoint.fingerprint`."""
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        digest.update(self._checkpoint.fingerprint().encode())
        return digest.hexdigest()


def _turned(sources: dict[str, Source], model: Any) -> dict[str, Source]:
    """``sources`` with quantized weights of Conv1D layers as the model has them, [k, o]: quantizers store [o, k] for any layer."""
    from transformers.pytorch_utils import Conv1D

    layers = [f".{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)]
    if not layers:
        return sources
    return {
        name: Swapped(source) if isinstance(source, QuantizedWeight) and any(f.endswith(f".{name}") for f in layers) else source
        for name, source in sources.items()
    }


def _license(folder: Path) -> str | None:
    """The ``license`` in the metadata block that begins the folder's model card."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    block = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    named = re.search(r"^license:[ ]*([\w.-]+)[ ]*$", block[1], re.MULTILINE) if block else None
    return named[1] if named else None
