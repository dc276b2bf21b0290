"""Generated CUDA as libraries of this machine: each kernel is translated to C++ and compiled when it is launched.

Libraries are kept by the hash of what they are made of, so that a kernel that several tests launch is compiled once. The
emulator itself is a library too, which all of them are linked to.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.cuda_emulator.instructions import body

HERE = Path(__file__).parent
HEADERS = ("emulator.h", "instructions.h", "matrix.h")
SOURCES = ("emulator.cpp", "instructions.cpp", "matrix.cpp")
FLAGS = ("-std=c++17", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", f"-I{HERE}")
# A kernel runs a few times: optimization would take longer than it saves.
KERNEL_FLAGS = ("-O0",)
EMULATOR_FLAGS = ("-O2",)

_PROLOGUE_END = "#define ushort unsigned short\n#endif"
_HELPER = re.compile(r"(__forceinline__ __device__ [\w ]+? )(tvm_builtin_\w+|ptx_\w+)\(([^)]*)\) \{\n(.*?)\n\}", re.S)
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) \{.*?^\}', re.S | re.M)
_DECLARATION = re.compile(r'extern "C" __global__ void [^{;]*;')


@dataclass(frozen=True)
class Kernel:
    """A kernel as C++: its name, the C types of its arguments, and its definition with all that it calls before it."""

    name: str
    types: tuple[str, ...]
    code: str

    def library(self, warp: int) -> ctypes.CDLL:
        """Its library with ``run_<name>(arguments, grid, block, cluster, shared)``, for warps of so many threads."""
        return ctypes.CDLL(str(build([self], warp)))


@cache
def kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a CUDA source, by name. A definition has the same text wherever its kernel stands: only what it calls is
    with it, and it is named ``kernel``."""
    code = _DECLARATION.sub("", translate(text))
    definitions = list(_KERNEL.finditer(code))
    prologue = code[: definitions[0].start()] if definitions else ""
    helpers = [(m[2], m[0]) for m in _HELPER.finditer(prologue)]
    rest = _HELPER.sub("", prologue)
    found = {}
    for match in definitions:
        name, types = match[1], tuple(_type(p) for p in match[2].split(",") if p.strip())
        definition = re.sub(rf"\b{name}\b", "kernel", match[0])
        parts = [definition]
        for helper, its_code in reversed(helpers):
            if any(helper in part for part in parts):
                parts.append(its_code)
        found[name] = Kernel(name, types, "\n".join([rest.strip(), *reversed(parts)]))
    return found


def build(chosen: Iterable[Kernel], warp: int) -> Path:
    """A library of such kernels, for warps of so many threads."""
    parts = [f'#include "{header}"\n' for header in HEADERS]
    for i, kernel in enumerate(chosen):
        arguments = ",".join(f"*({t}*)a[{n}]" for n, t in enumerate(kernel.types))
        code = kernel.code.replace('extern "C" __global__', "static")
        parts.append(
            f"namespace k{i} {{\n{code}\nstatic void all(void** a) {{ kernel({arguments}); }}\n}}\n"
            f'extern "C" void run_{kernel.name}(void** a,int gx,int gy,int gz,int bx,int by,int bz,int cluster,size_t shared) '
            f"{{ emu_launch(k{i}::all,a,gx,gy,gz,bx,by,bz,cluster,shared,{warp}); }}\n"
        )
    return _library("".join(parts), (*KERNEL_FLAGS, str(emulator())))


@cache
def emulator() -> Path:
    """The library of what kernels call."""
    return _library("".join(f'#include "{source}"\n' for source in SOURCES), EMULATOR_FLAGS)


@cache
def _own_sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")) + sorted(HERE.glob("*.cpp")))


def _library(program: str, options: Sequence[str]) -> Path:
    """The library of a C++ program, which may be there already. Several processes may make it at once."""
    folder = Path(tempfile.gettempdir()) / "llmc-cuda-emulator"
    folder.mkdir(exist_ok=True)
    made_of = "\0".join([program, *FLAGS, *options]).encode() + _own_sources()
    library = folder / (hashlib.sha256(made_of).hexdigest()[:24] + ".so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, built = Path(work) / "program.cpp", Path(work) / "program.so"
            source.write_text(program, encoding="utf-8")
            command = ["g++", *FLAGS, "-o", str(built), str(source), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the translated CUDA does not compile: {done.stderr[:3000]}")
            built.replace(library)
    return library


def _type(parameter: str) -> str:
    kind, name = re.sub(r"\b(__restrict__|const|__grid_constant__)\b", "", parameter).strip().rsplit(None, 1)
    stars = "*" * name.count("*")
    return kind.strip() + stars


def translate(text: str) -> str:
    """CUDA source as C++ over ``emulator.h``: PTX helpers get portable bodies, shared memory comes from the emulator."""
    unknown: list[str] = []

    def helper(match: re.Match[str]) -> str:
        prefix, name, signature, original = match.groups()
        code = body(name, signature)
        if code is None:
            if "asm" not in original:
                return match[0]
            unknown.append(name)
            return ""
        return f"{prefix}{name}({signature}) {{\n{code}\n}}"

    code = text[text.index(_PROLOGUE_END) + len(_PROLOGUE_END) :]
    code = _HELPER.sub(helper, code)
    if unknown:
        raise RuntimeError(f"the CUDA emulator does not know {', '.join(sorted(set(unknown)))}: add them to instructions.py")
    code = re.sub(r'asm volatile\(""[^;]*;', "", code)  # compiler barriers
    code = re.sub(r"union GmmaDescriptor.*?\n};", "", code, flags=re.S)
    code = re.sub(
        r"__shared__ (?:(?:__align__|alignas)\((\d+)\) )?(\w+) (\w+)\[(\d+)\];",
        lambda m: f'{m[2]}* {m[3]} = ({m[2]}*)emu_shared({m[1] or 16}, sizeof({m[2]}) * {m[4]}, "{m[3]}");',
        code,
    )
    return re.sub(
        r"extern __shared__ (?:__align__|alignas)\((\d+)\) (\w+) (\w+)\[\];",
        r'\2* \3 = (\2*)emu_shared(1024, dyn_bytes, "\3");',
        code,
    )
