"""Importing TVM the way every part of the compiler does: fast, and without torch where nobody asked for torch.

``import llmc.tvm_setup`` before ``tvm``; it is enough to do so once per process and costs nothing afterwards. It does three things:

- ``tvm_ffi`` imports torch whenever torch can be found (seconds, 200 MB). Unless torch is loaded already, it is hidden while
  TVM is imported, and can be imported normally afterwards.
- Every TVMScript decorator calls ``inspect.stack()``, and every use of an inlined function ``inspect.getouterframes()``, which look
  up the module of every frame among all loaded modules (half of the time that kernels for Hopper take). They are replaced by
  versions that read the frames only. And the text of an inlined function is parsed once, not at every use.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

# TVMScript reads the source line of its nearest callers only.
_FRAMES_WITH_SOURCE = 8


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    """``inspect.stack`` without the search for modules."""
    return _outer_frames(sys._getframe(1), context)


def _outer_frames(frame: FrameType | None, context: int = 1) -> list[inspect.FrameInfo]:
    """``inspect.getouterframes`` without the search for modules; source lines for the innermost frames."""
    frames: list[inspect.FrameInfo] = []
    while frame is not None:
        code = frame.f_code
        line = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals) if len(frames) < _FRAMES_WITH_SOURCE else ""
        source = [line] if line and context else None
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, source, 0 if source else None))
        frame = frame.f_back
    return frames


def import_tvm() -> ModuleType:
    """The ``tvm`` module, imported with torch out of sight unless torch is loaded already."""
    inspect.stack, inspect.getouterframes = _stack, _outer_frames
    hide = "torch" not in sys.modules and "tvm" not in sys.modules
    if hide:
        # The import system takes None for "no such module".
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
    finally:
        if hide:
            del sys.modules["torch"]
    from tvm.script.parser.core import doc

    doc.parse = _parsed_once(doc.parse)
    return tvm


def _parsed_once(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` with a memory for the texts of functions. Of functions inside functions it has none: TVM takes their decorators
    off the tree."""
    kept: dict[str, Any] = {}

    def parse_or_recall(source: str) -> Any:
        if re.search(r"^\s+def ", source, re.MULTILINE):
            return parse(source)
        if source not in kept:
            kept[source] = parse(source)
        return kept[source]

    return parse_or_recall


import_tvm()
