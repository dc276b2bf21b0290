"""The thin runtime: load an artifact and run it, with ``tvm_ffi``, ``libtvm_runtime``, NumPy, tokenizers and jinja2 alone.

Every name is imported on first use, so that ``import llmc.runtime`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.runtime.artifact import open_artifact
    from llmc.runtime.loading import load
    from llmc.runtime.model import Model
    from llmc.runtime.results import Completion, Event, Score, Timing, TokenLogprob
    from llmc.runtime.sampling import SamplingParams

__all__ = [
    "Completion",
    "Event",
    "Model",
    "SamplingParams",
    "Score",
    "Timing",
    "TokenLogprob",
    "load",
    "open_artifact",
]

_MODULES = {
    "Completion": "results",
    "Event": "results",
    "Model": "model",
    "SamplingParams": "sampling",
    "Score": "results",
    "Timing": "results",
    "TokenLogprob": "results",
    "load": "loading",
    "open_artifact": "artifact",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmc.runtime' has no attribute {name!r}")
    return getattr(import_module(f"llmc.runtime.{_MODULES[name]}"), name)
