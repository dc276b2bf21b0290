"""llmc: an ML compiler for LLM inference.

``llmc.compile(model, out=...)`` turns a decoder model into a relocatable artifact, ``llmc.add`` compiles it for another target,
``llmc.package`` makes a folder to deploy, and ``llmc.load(path)`` runs it. They are imported on first use, so that ``import
llmc`` costs nothing and running an artifact never loads the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmc.version import __version__

if TYPE_CHECKING:
    from llmc.add_variant import add as add
    from llmc.compiler import compile as compile
    from llmc.deploy import package as package
    from llmc.runtime import load as load

__all__ = ["__version__", "add", "compile", "load", "package"]

_HOMES = {"add": "llmc.add_variant", "compile": "llmc.compiler", "load": "llmc.runtime", "package": "llmc.deploy"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
