"""llmc: an ML compiler for LLM inference.

``llmc.compile(model, out=...)`` turns a decoder model into a relocatable artifact; ``llmc.load(path)`` runs it. Both
are imported on first use, so that ``import llmc`` costs nothing and running an artifact never loads the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmc.version import __version__

if TYPE_CHECKING:
    from llmc.compiler import compile as compile
    from llmc.runtime import load as load

__all__ = ["__version__", "compile", "load"]

_HOMES = {"compile": "llmc.compiler", "load": "llmc.runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
