"""GGUF tensors to a model's parameter names, by transformers' maps and tensor processors.

transformers has two generations of these. The new one is a list of weight conversions per architecture, the same kind that its
own checkpoints use. The old one is a name map (from the gguf package) and a processor per architecture that undoes what
llama.cpp's converter did to the values; it works on arrays, so here it becomes a function that runs when a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.binding import bind_sources, to_numpy
from llmc.importer.gguf.config import ROPE_TENSORS
from llmc.importer.gguf.file import GGUFFile
from llmc.importer.params import Mapped, Source
from llmc.importer.rows import reordered
from llmc.importer.source import Binding


@dataclass(frozen=True)
class _NameView:
    """What transformers' name map asks of a model, over the model and its base model only.

    On a real model the map is built once more for every submodule, which takes seconds; deeper names never match.
    """

    config: Any
    state: dict[str, torch.Tensor]
    children: tuple[tuple[str, _NameView], ...] = ()

    @classmethod
    def of(cls, model: Any) -> _NameView:
        prefix = model.base_model_prefix
        base = getattr(model, prefix, None)
        children = ((prefix, cls(model.config, base.state_dict())),) if base is not None else ()
        return cls(model.config, model.state_dict(), children)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def named_children(self) -> tuple[tuple[str, _NameView], ...]:
        return self.children


def bind_gguf(file: GGUFFile, values: dict[str, Any], model: Any) -> Binding:
    """Bind ``file`` to ``model`` (on the meta device); ``values`` are the config fields the file was mapped to.

    Block tensors stay in blocks where only their rows move. Raises as :func:`~llmc.importer.binding.bind_sources`, and
    UnsupportedError if there is no name map for the model's type.
    """
    from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported

    tensors: dict[str, Source] = {n: s for n, s in file.tensors.items() if n not in ROPE_TENSORS}
    if is_gguf_arch_supported(file.architecture):
        return bind_sources(model, tensors, get_gguf_conversion_mapping(file.architecture, model.config), str(file.path))
    named, unused = _processed(tensors, file, values, model)
    binding = bind_sources(model, named, [], str(file.path))
    binding.unused += unused
    return binding


def _processed(
    tensors: Mapping[str, Source], file: GGUFFile, values: dict[str, Any], model: Any
) -> tuple[dict[str, Source], list[str]]:
    """Sources by the model's names, through the old generation of transformers' maps; and the tensors no name takes."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=values)
    try:
        names: dict[str, str] = get_gguf_hf_weights_map(_NameView.of(model), processor)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"the gguf package has no tensor names for the model type {model.config.model_type!r} of {file.path}"
        ) from error
    groups: dict[str, list[str]] = {}
    unused = []
    for name in tensors:
        # names of expert tensors are mapped without their suffix
        target = names.get(name) or names.get(name.removesuffix(".weight"))
        if target is None:
            unused.append(name)
        else:
            groups.setdefault(target, []).append(name)
    state = model.state_dict()
    sources: dict[str, Source] = {}
    for target, members in groups.items():
        inputs = tuple(tensors[n] for n in members)
        shape = tuple(state[target].shape) if target in state else inputs[0].shape
        function = partial(_run, processor, names, members, target)
        same = reordered(inputs, function, shape)
        if same is None and len(inputs) == 1 and prod(inputs[0].shape) != prod(shape):
            same = inputs[0]  # no reordering can make it fit: binding reports the two shapes
        checked = partial(_checked, function, shape, f"{target} of {file.path}")
        sources[target] = same or Mapped(inputs, checked, shape, "float32", type(processor).__name__)
    return sources, unused


def _run(processor: Any, names: dict[str, str], members: list[str], target: str, *arrays: np.ndarray) -> np.ndarray | None:
    """What the processor makes of the tensors ``members`` for ``target``; None if it makes nothing under that name.

    Processors return an array with a name, or put torch tensors under model names into ``parsed_parameters`` themselves.
    """
    parsed: dict[str, dict[str, Any]] = {"tensors": {}}
    for name, array in zip(members, arrays, strict=True):
        result = processor.process(weights=array, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
        if result.name in names:
            parsed["tensors"][names[result.name]] = result.weights
    made = parsed["tensors"].get(target)
    return to_numpy(made) if isinstance(made, torch.Tensor) else made


def _checked(function: Any, shape: tuple[int, ...], what: str, *arrays: np.ndarray) -> np.ndarray:
    made = function(*[np.asarray(a, np.float32) for a in arrays])
    if made is None or made.shape != shape:
        found = "nothing" if made is None else list(made.shape)
        raise ModelError(f"transformers' GGUF conversion makes {found} for {what}, which must be {list(shape)}")
    result: np.ndarray = made
    return result
