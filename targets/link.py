"""Linking a compiled module into a shared library: the host's own linker, or ziglang's for every other machine.

The library needs only the C library and its mathematics; the TVM runtime's symbols are resolved from the process that loads it. On
Windows a library says which other one each symbol is from: there it is linked with an import library of tvm-ffi's C ABI.

The same objects give the same library: they get names that do not change, and no linker is to write a time or a build's number.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmc.errors import InternalError, MissingExtraError
from llmc.targets.base import Target

LIBRARY = "lib.so"
"""What a library is called while it is linked: on macOS its name is part of it."""


def linker(target: Target) -> Callable[..., None]:
    """A linker in the form ``export_library(fcompile=...)`` takes. Raises MissingExtraError if there is none for ``target``."""
    command, libraries = _command(target), [] if target.triple.endswith("-android") else ["-lm"]

    def link(output: str, objects: str | Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        files = [objects] if isinstance(objects, str) else list(objects)
        with tempfile.TemporaryDirectory(prefix="llmc-link-") as folder:
            windows = "-windows-" in target.triple
            if windows:
                files.append(import_library(Path(folder), target.triple))
            # What a linker writes beside a library, such as a library to link with it, goes with the folder.
            library = Path(folder) / LIBRARY
            _run([*command, "-o", str(library), *files, *(options or []), *libraries], target.triple)
            if windows:
                _clear_time(library)
            shutil.move(library, output)

    link.output_format = "so"  # type: ignore[attr-defined]
    link.get_target_triple = lambda: target.triple  # type: ignore[attr-defined]
    return link


def _clear_time(library: Path) -> None:
    """Zero the time of linking in the header of a Windows library (PE format: four bytes, eight behind the signature that the word
    at 0x3c points to)."""
    with library.open("r+b") as file:
        file.seek(0x3C)
        header = int.from_bytes(file.read(4), "little")
        file.seek(header)
        if file.read(4) != b"PE\0\0":
            raise InternalError(f"the linker made no Windows library: no PE signature at byte {header}")
        file.seek(header + 8)
        file.write(bytes(4))


def _run(command: Sequence[str], triple: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InternalError(f"linking for {triple} failed ({' '.join(command[:3])}): {done.stderr.strip()[-800:]}")


def import_library(folder: Path, triple: str) -> str:
    """An import library for ``tvm_ffi.dll``, made from the names that tvm-ffi's headers declare: ``tvm_ffi.lib`` in ``folder``."""
    spec = importlib.util.find_spec("tvm_ffi")
    headers = [p for f in (spec.submodule_search_locations or []) for p in sorted(Path(f).rglob("*c_*api.h"))] if spec else []
    names = sorted({name for p in headers for name in re.findall(r"\b(TVMFFI\w+)\(", p.read_text(encoding="utf-8"))})
    if not names:
        raise MissingExtraError(f"linking for {triple} needs the headers of apache-tvm-ffi: run `pip install apache-tvm-ffi`")
    library = folder / "tvm_ffi.lib"
    with tempfile.TemporaryDirectory(prefix="llmc-link-") as scratch:
        definition = Path(scratch) / "tvm_ffi.def"
        definition.write_text("LIBRARY tvm_ffi.dll\nEXPORTS\n" + "".join(f"  {name}\n" for name in names), encoding="ascii")
        machine = "i386:x86-64" if triple.startswith("x86_64") else "arm64"
        zig = [sys.executable, "-m", "ziglang"]
        _run([*zig, "dlltool", "-m", machine, "-D", "tvm_ffi.dll", "-d", str(definition), "-l", str(library)], triple)
    return str(library)


def is_host(target: Target) -> bool:
    """Whether this machine's own linker makes libraries for ``target``."""
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return target.triple == f"{arch}-linux-gnu" and platform.system() == "Linux"


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
        name = f"-Wl,-install_name,@rpath/{LIBRARY}"
        return [*zig, "cc", "-target", f"{arch}-macos.{version}", "-shared", "-Wl,-undefined,dynamic_lookup", name]
    if system.endswith("android"):
        # zig has no C library of Android: the library is left to find it in the process. Pages of 16 KB work with 4 KB too.
        return [*zig, "ld.lld", "-shared", "-z", "max-page-size=16384"]
    # zig's names of targets have no vendor. Without -s a Windows library gets a file of debugging data, with a number that changes.
    strip = ["-s"] if "-windows-" in system else []
    return [*zig, "cc", "-target", target.triple.replace("-pc-", "-"), "-shared", *strip]
