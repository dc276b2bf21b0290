"""Linking a compiled module into a shared library: the host's own linker, or ziglang's for every other machine.

The library needs only the C library and its mathematics; the TVM runtime's symbols are resolved from the process that loads it.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llmc.errors import InternalError, MissingExtraError
from llmc.targets.base import Target


def linker(target: Target) -> Callable[..., None]:
    """A linker in the form ``export_library(fcompile=...)`` takes. Raises MissingExtraError if there is none for ``target``."""
    command, libraries = _command(target), [] if target.triple.endswith("-android") else ["-lm"]

    def link(output: str, objects: str | Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        files = [objects] if isinstance(objects, str) else list(objects)
        done = subprocess.run(
            [*command, "-o", output, *files, *(options or []), *libraries], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InternalError(f"linking for {target.name} failed ({' '.join(command[:3])}): {done.stderr.strip()[-800:]}")

    link.output_format = "so"  # type: ignore[attr-defined]
    link.get_target_triple = lambda: target.triple  # type: ignore[attr-defined]
    return link


def is_host(target: Target) -> bool:
    """Whether this machine's own linker makes libraries for ``target``."""
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return target.triple.split("-")[0] == arch and platform.system() == "Linux"


def host_c_compiler() -> list[str]:
    """A command that compiles and links C for this machine. Raises MissingExtraError if there is none."""
    native = _native()
    if native is not None:
        return [native]
    if importlib.util.find_spec("ziglang") is None:
        raise MissingExtraError("this machine has no C compiler to link with: run `pip install ziglang==0.17.1`")
    return [sys.executable, "-m", "ziglang", "cc"]


def _native() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _command(target: Target) -> list[str]:
    native = _native()
    if native is not None and is_host(target):
        return [native, "-shared", "-fPIC", "-Wl,--as-needed"]
    if importlib.util.find_spec("ziglang") is None:
        why = "this machine has no C compiler to link with" if is_host(target) else "it is another kind of machine than this one"
        raise MissingExtraError(f"target {target.name} needs the ziglang linker ({why}): run `pip install ziglang==0.17.1`")
    zig = [sys.executable, "-m", "ziglang"]
    machine, _, system = target.triple.partition("-")
    if system.startswith("apple-macos"):
        # Symbols of the TVM runtime are looked up in the process, as they are on Linux; no SDK is needed for that.
        version = system.removeprefix("apple-macos")
        arch = {"arm64": "aarch64"}.get(machine, machine)
        return [*zig, "cc", "-target", f"{arch}-macos.{version}", "-shared", "-Wl,-undefined,dynamic_lookup"]
    if system.endswith("android"):
        # zig has no C library of Android: the library is left to find it in the process. Pages of 16 KB work with 4 KB too.
        return [*zig, "ld.lld", "-shared", "-z", "max-page-size=16384"]
    return [*zig, "cc", "-target", target.triple, "-shared"]
