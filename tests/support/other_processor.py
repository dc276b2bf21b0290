"""Runs CPU kernels of a 64-bit Arm target on this machine: cross-built, their runner built by zig, under qemu's user mode."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.tensors import dtype_code
from llmc.targets.base import Target
from llmc.targets.cpu import ARM
from llmc.targets.link import linker
from llmc.wheels import runtime_files

SYSROOT = Path("/usr/aarch64-linux-gnu")
PACKAGES = "qemu-user-static, libc6-arm64-cross, libstdc++6-arm64-cross and libgcc-s1-arm64-cross"
"""Debian's, with the emulator and the C library of the other processor."""


def emulator() -> list[str]:
    """The command that runs a program for 64-bit Arm. Raises RuntimeError without one."""
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None or not SYSROOT.is_dir():
        raise RuntimeError(f"nothing here runs programs for 64-bit Arm: install {PACKAGES}")
    return [qemu, "-L", str(SYSROOT)]


def run(module: Any, target: Target, calls: Sequence[tuple[str, Sequence[np.ndarray]]], folder: Path) -> list[list[np.ndarray]]:
    """Call functions of a built ``module``, each with copies of its arrays; the arrays of each call as they are after it."""
    command = emulator()
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    runtime = folder / "runtime"
    runtime.mkdir()
    for library in runtime_files("cpu", ARM, version("apache-tvm")):
        shutil.copy2(library, runtime / library.name)
    spec = find_spec("tvm_ffi")
    assert spec is not None and spec.submodule_search_locations
    include = Path(spec.submodule_search_locations[0]) / "include"
    build = [sys.executable, "-m", "ziglang", "cc", "-target", ARM, "-O2", f"-I{include}", f"-L{runtime}"]
    build += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{runtime}"]
    subprocess.run([*build, str(Path(__file__).with_name("kernel_runner.c")), "-o", str(folder / "runner")], check=True)
    with (folder / "requests").open("wb") as requests:
        for name, arrays in calls:
            requests.write(f"call {name} {len(arrays)}\n".encode())
            for array in arrays:
                line = [*dtype_code(str(array.dtype)), array.ndim, *array.shape]
                requests.write((" ".join(map(str, line)) + "\n").encode())
            for array in arrays:
                requests.write(np.ascontiguousarray(array).tobytes())
    subprocess.run([*command, *(str(folder / name) for name in ("runner", "kernels.so", "requests", "results"))], check=True)
    data, at, after = (folder / "results").read_bytes(), 0, []
    for _, arrays in calls:
        found = []
        for array in arrays:
            found.append(np.frombuffer(data, array.dtype, array.size, at).reshape(array.shape))
            at += array.nbytes
        after.append(found)
    assert at == len(data)
    return after
