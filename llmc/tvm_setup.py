"""Importing TVM the way every part of the compiler does: fast, and without torch where nobody asked for torch.

``import llmc.tvm_setup`` before ``tvm``; it is enough to do so once per process and costs nothing afterwards. It does two things:

- ``tvm_ffi`` imports torch whenever torch can be found (seconds, 200 MB). Unless torch is loaded already, it is hidden while
  TVM is imported, and can be imported normally afterwards.
- Every TVMScript decorator calls ``inspect.stack()``, which looks up the module of every frame among all loaded modules
  (tens of seconds over ``tvm.s_tir.tensor_intrin``). It is replaced by a version that reads the frames only.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from types import FrameType, ModuleType

# TVMScript reads the source line of its nearest callers only.
_FRAMES_WITH_SOURCE = 8


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    """``inspect.stack`` without the search for modules; source lines for the innermost frames."""
    frames: list[inspect.FrameInfo] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        line = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals) if len(frames) < _FRAMES_WITH_SOURCE else ""
        source = [line] if line and context else None
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, source, 0 if source else None))
        frame = frame.f_back
    return frames


def import_tvm() -> ModuleType:
    """The ``tvm`` module, imported with torch out of sight unless torch is loaded already."""
    inspect.stack = _stack
    hide = "torch" not in sys.modules and "tvm" not in sys.modules
    if hide:
        # The import system takes None for "no such module".
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
    finally:
        if hide:
            del sys.modules["torch"]
    return tvm


import_tvm()
