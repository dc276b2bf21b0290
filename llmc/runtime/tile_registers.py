"""AMX's tile registers: Linux keeps their eight kilobytes for the threads of a process only if it asked to use them.

A processor that has them raises an exception at the first tile instruction of a process that did not ask.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

FEATURES = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
"""What code for them needs, as /proc/cpuinfo calls it."""
_ARCH_PRCTL = 158
_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18
"""ARCH_REQ_XCOMP_PERM of ``arch_prctl``, and the number of the state (Linux, Documentation/arch/x86/xstate.rst)."""


def usable(features: frozenset[str]) -> frozenset[str]:
    """Of the processor's ``features`` those that this process may use: all, or all but :data:`FEATURES` where :func:`refusal` says
    why not. Asks the system only if the processor has them."""
    return features - FEATURES if features & FEATURES and refusal() else features


@cache
def refusal() -> str | None:
    """Ask the system for all threads of this process, once: what it answered, one phrase, if it does not allow them; else None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"llmc asks for tile registers on Linux for x86-64 alone, not on {sys.platform} for {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_REQUEST_PERMISSION), ctypes.c_ulong(_TILE_DATA)) == 0:
        return None
    return f"Linux does not let this process use tile registers ({os.strerror(ctypes.get_errno())})"
