"""What building for CUDA takes besides TVM, with or without a driver: a compiler, cudart, and the driver's symbols.

TVM compiles device code while it builds only if ``libtvm_runtime_cuda.so`` can be loaded; otherwise it would store CUDA
*source* in the library, and the machine that runs it would need a compiler. That library links to the driver, of which
nothing is called while building: where there is no driver, a library of the same name whose functions all fail stands in.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
import tvm.support.nvcc  # registers TVM's own compile callback, so that ours, registered later, replaces it
import tvm_ffi

from llmc.errors import InternalError, MissingExtraError
from llmc.runtime.library import CUDA_LIBRARY_NAME, find_cudart
from llmc.targets import nvrtc
from llmc.targets.link import host_c_compiler

INSTALL = "run `pip install nvidia-cuda-nvrtc==13.* nvidia-cuda-runtime==13.* nvidia-cuda-cccl==13.*`"

NVCC_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")
"""No ``--use_fast_math``: kernels say themselves where an approximate function will do."""

_DRIVER = ("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuGetProcAddress", "cuGetProcAddress_v2",
           "cuInit", "cuDriverGetVersion", "cuLaunchKernelEx", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload",
           "cuTensorMapEncodeTiled")  # fmt: skip
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def find_nvcc() -> Path | None:
    """nvcc: on the PATH, in ``/usr/local/cuda``, or from the PyPI package. None if there is none, or no C++ compiler, which it
    needs to preprocess."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return None
    found = shutil.which("nvcc")
    candidates = [Path(found)] if found else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        candidates += [Path(folder) / "cu13" / "bin" / "nvcc", Path(folder) / "cuda_nvcc" / "bin" / "nvcc"]
    return next((path for path in candidates if path.is_file()), None)


def writes_ptx(arch: str) -> bool:
    """Whether code for an architecture comes with PTX, which newer GPUs' drivers translate: by nvcc, for what all of them have."""
    return arch[-1].isdigit() and find_nvcc() is not None


def compiler() -> Callable[[str, str], bytes]:
    """What turns CUDA source into machine code for an architecture (``"sm_90a"``), a fatbin or a cubin: no source, and PTX only
    where :func:`writes_ptx` says so. It raises InternalError if it refuses the source.

    nvcc where there is one, else NVRTC. Raises MissingExtraError naming what to install if there is neither.
    """
    nvcc = find_nvcc()
    if nvcc is not None:
        return partial(_run_nvcc, nvcc)
    library = nvrtc.find()
    if library is None:
        raise MissingExtraError(f"compiling for CUDA needs nvcc or NVRTC of CUDA 13, and neither is installed here: {INSTALL}")
    return library.compile


def _run_nvcc(nvcc: Path, source: str, arch: str) -> bytes:
    number = arch.removeprefix("sm_")
    kinds = f"[sm_{number},compute_{number}]" if writes_ptx(arch) else f"sm_{number}"
    with tempfile.TemporaryDirectory(prefix="llmc-nvcc-") as folder:
        code, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        code.write_text(source, encoding="utf-8")
        command = [str(nvcc), "--fatbin", *NVCC_FLAGS, "-gencode", f"arch=compute_{number},code={kinds}"]
        done = subprocess.run([*command, "-o", str(binary), str(code)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InternalError(f"nvcc refuses the kernels generated for {arch}: {(done.stderr or done.stdout).strip()[-1500:]}")
        return binary.read_bytes()


@cache
def prepare() -> None:
    """Make this process able to build CUDA modules. Raises MissingExtraError naming what to install."""
    compile_source = compiler()
    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        _load_driver()
        cudart = find_cudart()
        if cudart is None:
            raise MissingExtraError(f"compiling for CUDA needs libcudart.so.13, and it is not installed here: {INSTALL}")
        ctypes.CDLL(str(cudart), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / CUDA_LIBRARY_NAME))

    @tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
    def _compile(source: str, *_: Any) -> bytes:
        return compile_source(source, str(tvm.target.Target.current(allow_none=False).attrs["arch"]))


def _load_driver() -> None:
    """The driver's library if this machine has one, else one of its name in which every call fails."""
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
        return
    except OSError:
        pass
    with tempfile.TemporaryDirectory(prefix="llmc-driver-") as folder:
        source, library = Path(folder) / "driver.c", Path(folder) / "libcuda.so.1"
        source.write_text("".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER), encoding="ascii")
        command = [*host_c_compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InternalError(f"the stand-in for the CUDA driver cannot be linked: {done.stderr.strip()[-800:]}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
