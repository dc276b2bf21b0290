"""CUDA source to machine code with NVIDIA's runtime compilation library: no nvcc, no host compiler, three PyPI packages.

``libnvrtc`` comes from ``nvidia-cuda-nvrtc``, CUDA's headers from ``nvidia-cuda-runtime`` and ``nvidia-cuda-cccl``; an installed
CUDA toolkit has all three. Despite its name it is used while compiling a model only: an artifact holds machine code.
Reference: NVIDIA, "NVRTC" user guide.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import InternalError

LIBRARY = "libnvrtc.so.13"
_BUILTINS = "libnvrtc-builtins.so.13.*"

# <cuda.h> declares it, which is the driver's header and does not parse without a host compiler's.
_PROLOGUE = "struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };\n"


@dataclass(frozen=True)
class Nvrtc:
    """Where the library is, and the folders that hold CUDA's headers."""

    library: Path
    includes: tuple[Path, ...]

    def compile(self, source: str, arch: str) -> bytes:
        """A cubin for ``arch`` (``"sm_90a"``). Raises InternalError with the compiler's words if it refuses the source."""
        nvrtc = self._load()
        program = ctypes.c_void_p()
        text = (_PROLOGUE + source).encode()
        _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None))
        try:
            words = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "-w", *(f"-I{path}" for path in self.includes)]
            options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
            if nvrtc.nvrtcCompileProgram(program, len(words), options):
                raise InternalError(f"NVRTC refuses the kernels generated for {arch}: {_log(nvrtc, program)[-1500:]}")
            size = ctypes.c_size_t()
            _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
            binary = ctypes.create_string_buffer(size.value)
            _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, binary))
            return binary.raw
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _load(self) -> ctypes.CDLL:
        # The library opens its builtins by name alone, which finds them only if they are in the process already.
        for path in sorted(self.library.parent.glob(_BUILTINS)):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(self.library))
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library


def find() -> Nvrtc | None:
    """NVRTC of CUDA 13 with its headers, from PyPI packages or ``/usr/local/cuda``; None if either is missing."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(folder) / "cu13" for folder in (spec.submodule_search_locations or [] if spec is not None else [])]
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        library = next((root / part / LIBRARY for part in ("lib", "lib64") if (root / part / LIBRARY).is_file()), None)
        include = root / "include"
        if library is not None and (include / "cuda_bf16.h").is_file() and (include / "cccl" / "cuda" / "std").is_dir():
            return Nvrtc(library, (include, include / "cccl"))
    return None


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        raise InternalError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(max(size.value, 1))
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()
