"""llmc: an ML compiler for LLM inference.

``llmc.compile(model, out=...)`` turns a decoder model into a relocatable artifact; ``llmc.load(path)`` runs it. Both
are imported on first use, so that ``import llmc`` costs nothing and running an artifact never loads the compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.version import __version__

if TYPE_CHECKING:
    from llmc.compile import compile as compile
    from llmc.runtime import load as load

__all__ = ["__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    if name == "compile":
        from llmc.compile import compile as entry

        return entry
    if name == "load":
        from llmc.runtime import load as entry

        return entry
    raise AttributeError(f"module 'llmc' has no attribute {name!r}")
