"""AMX's tile instructions on this machine: its own, or emulated where it has none (``amx_emulator.c``)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from llmc.runtime.host import host
from llmc.runtime.tile_registers import FEATURES
from llmc.targets.base import Target
from llmc.targets.link import host_c_compiler

KINDS = ("byte products", "bfloat16 products", "configurations", "releases")
"""What the emulator counts."""


def lacking(target: Target) -> str:
    """What this machine lacks to run code for ``target``, features of the processor or another one; empty if nothing: what is
    emulated is not lacking."""
    here = host()
    if (here.machine, here.system) != ("x86_64", "linux"):
        return f"x86-64 with Linux (this is {here.machine} with {here.system})"
    return ", ".join(sorted(set(target.features) - FEATURES - (here.features or frozenset())))


def use(target: Target) -> None:
    """Have this process run code for ``target``."""
    if FEATURES & set(target.features) - (host().features or frozenset()):
        emulator()


@cache
def emulator() -> Any:
    """The emulator, at work in this process from now on."""
    folder = Path(mkdtemp(prefix="llmc-amx-"))
    try:
        library, source = folder / "amx_emulator.so", Path(__file__).with_name("amx_emulator.c")
        command = [*host_c_compiler(), "-O2", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder)
    loaded.llmc_amx_count.restype = ctypes.c_long
    loaded.llmc_emulate_amx()
    return loaded


def counts() -> dict[str, int]:
    """How many instructions of each of :data:`KINDS` were emulated so far."""
    return {kind: emulator().llmc_amx_count(i) for i, kind in enumerate(KINDS)}
