"""The reference that artifacts are compared with: transformers' own implementation, its own loading, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import ModelError

if TYPE_CHECKING:
    from llmc.importer.source import ModelSource


class Reference:
    """A transformers causal language model in float32. One sequence at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits of every position: float32 ``[len(ids), vocab]``."""
        import torch

        with torch.no_grad():
            out: np.ndarray = self._model(torch.tensor([list(ids)])).logits[0].float().numpy()
        return out

    def teacher_forced(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """:meth:`logits` as the runtime's model gives them in chunks: here one, with the index of its first row."""
        yield 0, self.logits(ids)

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The ``tokens`` likeliest next tokens, one after the other; the end-of-text token does not stop it."""
        import torch

        step, past, found = torch.tensor([list(ids)]), None, []
        with torch.no_grad():
            for _ in range(tokens):
                out = self._model(step, past_key_values=past, use_cache=True)
                past = out.past_key_values
                step = out.logits[:, -1:].argmax(-1)
                found.append(int(step))
        return found


def reference_model(model: str) -> Reference:
    """The model that ``model`` names (as on the command line), read by transformers alone; a quantized checkpoint, for which
    transformers asks for packages of each method, by llmc's importer into transformers' model. Raises ModelError."""
    from llmc.extras import require

    require("compile", f"comparing with {model}")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from llmc.importer.huggingface.config import load_quantization
    from llmc.importer.resolve import resolve

    source = resolve(model)
    if source.kind == "huggingface" and load_quantization(source.path) is not None:
        return Reference(_dequantized(source))
    where = (source.path.parent, source.path.name) if source.path.is_file() else (source.path, None)
    logging.disable_progress_bar()  # ours says what is going on
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            where[0], gguf_file=where[1], dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"transformers cannot load {source.path} as the reference ({reason})") from error
    return Reference(loaded)


def _dequantized(source: ModelSource) -> Any:
    """transformers' model of a quantized checkpoint, with the values that its codes stand for."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmc.importer.binding import to_torch

    loaded = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, attn_implementation="eager")
    binding = source.bind(loaded)
    if binding.missing:
        raise ModelError(f"the checkpoint in {source.path} lacks {', '.join(binding.missing)}: download it again")
    state = loaded.state_dict()
    with torch.no_grad():
        for param in binding.table.values():
            state[param.name].copy_(to_torch(param.source.read()))
    return loaded
