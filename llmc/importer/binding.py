"""From a checkpoint's tensor names to a model's parameter names, by transformers' own conversion rules.

transformers keeps, for every model type, what its checkpoints need: renamings, and conversions that merge, split or reorder
tensors (``conversion_mapping.py``; applied by ``core_model_loading.convert_and_load_state_dict_in_model``). The same rules are
applied here to names and shapes only; a conversion becomes a source that runs when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, dot_natural_key, rename_source_key

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.params import DTYPES, Mapped, ParamTable, Source
from llmc.importer.rows import reordered
from llmc.importer.source import Binding
from llmc.importer.tied import resolve_ties
from llmc.passes.quantize.native import QuantizedSource

_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_NAMES_SHOWN = 8


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor over the same memory; bfloat16 through its bits, since torch does not know ml_dtypes."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of :func:`to_torch`: a C-contiguous array."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()


@dataclass
class _Conversion:
    """One run of a checkpoint conversion: its inputs by source pattern, and the model names it makes."""

    converter: WeightConverter
    first_target: str
    inputs: list[tuple[str, str, Source]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return "+".join(type(op).__name__ for op in self.converter.operations)

    def run(self, model: Any, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors it makes, by model name, from one tensor per input."""
        converter = deepcopy(self.converter)
        for (pattern, key, _), tensor in zip(self.inputs, tensors, strict=True):
            # takes tensors as well as the futures it is annotated with (materialize_tensors)
            converter.add_tensor(self.first_target, key, pattern, tensor)  # type: ignore[arg-type]
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def numpy(self, model: Any, target: str, *arrays: np.ndarray) -> np.ndarray:
        """The array of ``target``, from one array per input."""
        return to_numpy(self.run(model, [to_torch(np.asarray(a, order="C")) for a in arrays])[target])

    def sources(self, model: Any) -> dict[str, Source]:
        """One lazy source per model name; shapes come from running the conversion on meta tensors."""
        meta = [torch.empty(s.shape, dtype=_TORCH_DTYPES[s.dtype], device="meta") for _, _, s in self.inputs]
        try:
            made = self.run(model, meta)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise ModelError(
                f"the conversion {self.label} of {', '.join(s.describe() for _, _, s in self.inputs[:_NAMES_SHOWN])} "
                f"into {self.first_target} fails on their shapes ({error}): the checkpoint and config.json do not belong together"
            ) from error
        inputs = tuple(s for _, _, s in self.inputs)
        sources: dict[str, Source] = {}
        for name, tensor in made.items():
            function = partial(self.numpy, model, name)
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            quantized = all(isinstance(s, QuantizedSource) for s in inputs)
            sources[name] = (quantized and reordered(inputs, function, shape)) or Mapped(inputs, function, shape, dtype, self.label)
        return sources


def kept(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """``names`` without those in which any of the regular expressions ``patterns`` finds a match."""
    compiled = [re.compile(p) for p in patterns]
    return [n for n in names if not any(p.search(n) for p in compiled)]


def _unused_patterns(model: Any) -> set[str]:
    """What transformers drops from a checkpoint without a word, for this model (``_adjust_missing_and_unexpected_keys``)."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(n.endswith("rotary_emb.inv_freq") for n in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(n.endswith("position_ids") for n in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def bind_sources(model: Any, sources: Mapping[str, Source], transforms: list[WeightTransform], where: str) -> Binding:
    """Bind checkpoint tensors to the parameters and persistent buffers of ``model`` (on the meta device).

    ``transforms`` are transformers' rules for this model and format; ``where`` names the checkpoint in errors. No data is read,
    except to compare a tied pair that the checkpoint stores twice. Where its halves differ, the tie in ``model`` is undone.
    Raises ModelError naming every tensor whose shape contradicts the model's.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    transforms = deepcopy(transforms)  # matching a name marks a rule as used
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Source] = {}
    conversions: dict[str, _Conversion] = {}
    unused: list[str] = []
    for key in sorted(sources, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            unused.append(key)
        elif pattern is not None:
            conversion = conversions.setdefault(name, _Conversion(deepcopy(by_pattern[pattern]), name))
            conversion.inputs.append((pattern, key, sources[key]))
        elif name in found:
            raise ModelError(f"{found[name].describe()} and {sources[key].describe()} of {where} are both {name}: keep one")
        else:
            found[name] = sources[key]
    for conversion in conversions.values():
        found.update(conversion.sources(model))
    unknown = sorted(set(found) - set(state))
    if unknown:
        raise UnsupportedError(f"the checkpoint conversions of {where} make tensors the model does not have: {', '.join(unknown)}")
    _check_shapes(found, state, where)
    tied = resolve_ties(model, found)
    table = ParamTable()
    for name in state:
        if name in found:
            table.add(name, found[name])
    missing = [n for n in state if n not in found and n not in tied]
    return Binding(table, tied, kept(missing, model._keys_to_ignore_on_load_missing or ()), kept(unused, _unused_patterns(model)))


def _check_shapes(found: Mapping[str, Source], state: Mapping[str, torch.Tensor], where: str) -> None:
    wrong = [
        f"{source.describe()} is {list(source.shape)} and {name} must be {list(state[name].shape)}"
        for name, source in found.items()
        if source.shape != tuple(state[name].shape)
    ]
    if wrong:
        more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        raise ModelError(
            f"the weights of {where} contradict its config: {'; '.join(wrong[:_NAMES_SHOWN])}{more}: "
            "use the config and the weights of the same model"
        )
