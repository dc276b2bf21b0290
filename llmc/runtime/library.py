"""Load ``tvm_ffi`` and ``libtvm_runtime`` into the process: the only native code that running an artifact needs.

``import tvm_ffi`` imports torch wherever torch can be found (seconds and 190 MB), so torch is hidden while it is imported.
The runtime library exports its symbols to the whole process (``RTLD_GLOBAL``): a compiled module resolves them at load.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.errors import ArtifactError, MissingExtraError

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY_NAME = ("" if sys.platform == "win32" else "lib") + "tvm_runtime" + _SUFFIX
CUDA_LIBRARY_NAME = ("" if sys.platform == "win32" else "lib") + "tvm_runtime_cuda" + _SUFFIX
METAL_LIBRARY_NAME = "lib" + "tvm_runtime_metal" + _SUFFIX
CUDART_NAME = "libcudart.so.13"
_loaded: list[ctypes.CDLL] = []


def import_ffi() -> ModuleType:
    """The module ``tvm_ffi``, imported without torch. A later ``import torch`` of the caller works as ever.

    Raises MissingExtraError if it is not installed.
    """
    if "tvm_ffi" in sys.modules:
        return sys.modules["tvm_ffi"]
    modules: dict[str, Any] = sys.modules
    hide = "torch" not in modules
    if hide:
        # None makes ``import torch`` raise ImportError, which tvm_ffi takes for "not installed"
        modules["torch"] = None
    try:
        import tvm_ffi
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"running an artifact needs apache-tvm-ffi, and {error.name} is not installed here: "
            "run `pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'`"
        ) from error
    finally:
        if hide:
            del modules["torch"]
    return tvm_ffi


def find_cudart() -> Path | None:
    """CUDA's runtime library: of the PyPI package, of a CUDA installation, or the one the system's loader knows; else None."""
    spec = importlib.util.find_spec("nvidia")
    packages = spec.submodule_search_locations or [] if spec is not None else []
    candidates = [Path(folder) / part / "lib" / CUDART_NAME for folder in packages for part in ("cu13", "cuda_runtime")]
    candidates += [Path("/usr/local/cuda") / part / CUDART_NAME for part in ("lib64", "lib")]
    for path in candidates:
        if path.is_file():
            return path
    try:
        ctypes.CDLL(CUDART_NAME)
    except OSError:
        return None
    return Path(CUDART_NAME)


def installed_library(name: str = LIBRARY_NAME) -> Path | None:
    """A runtime library of the installed apache-tvm package, found without importing it; None if there is none."""
    spec = importlib.util.find_spec("tvm")
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or []:
        for candidate in (Path(folder) / "lib" / name, Path(folder) / name):
            if candidate.is_file():
                return candidate
    return None


def installed_version() -> str | None:
    """The version of the installed apache-tvm package, read from its metadata; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("apache-tvm")
    except PackageNotFoundError:
        return None


def load_runtime(artifact: Path | None = None, version: str | None = None) -> ModuleType:
    """Load the TVM runtime into this process and return ``tvm_ffi``.

    The library of an imported ``tvm`` serves as it is; else, if it is of TVM ``version`` (which built the artifact), the installed
    package's: the compiler uses that one, and a process that loads two aborts. Else the one in ``artifact/runtime/``, and without
    that the installed one. Raises MissingExtraError if there is none, and ArtifactError if the one found cannot be loaded.
    """
    ffi = import_ffi()
    if "tvm" in sys.modules or _loaded:
        return ffi
    path = _library(LIBRARY_NAME, artifact, version)
    if path is None:
        raise MissingExtraError(
            f"running an artifact needs {LIBRARY_NAME}: it is neither in the artifact's runtime folder nor in an installed "
            "apache-tvm: run `pip install apache-tvm==0.27.0.post1`"
        )
    try:
        _loaded.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise ArtifactError(
            f"the TVM runtime {path} cannot be loaded ({error}): run `pip install --force-reinstall apache-tvm==0.27.0.post1`"
        ) from error
    return ffi


def load_cuda_runtime(artifact: Path | None = None, version: str | None = None) -> ModuleType:
    """As :func:`load_runtime`, with TVM's CUDA runtime as well; ``libcudart`` must be in the process already.

    Raises MissingExtraError if there is none, and ArtifactError if the one found cannot be loaded (no driver).
    """
    return _with_device("cuda", CUDA_LIBRARY_NAME, "install the NVIDIA driver for CUDA 13", artifact, version)


def load_metal_runtime(artifact: Path | None = None, version: str | None = None) -> ModuleType:
    """As :func:`load_runtime`, with TVM's Metal runtime as well. Errors are those of :func:`load_cuda_runtime`."""
    return _with_device("metal", METAL_LIBRARY_NAME, "run it on macOS 13 or newer", artifact, version)


def _library(name: str, artifact: Path | None, version: str | None) -> Path | None:
    """Where :func:`load_runtime` takes a library from."""
    own = None if artifact is None else artifact / "runtime" / name
    if own is None or not own.is_file():
        return installed_library(name)
    same = version is not None and version == installed_version()
    return (installed_library(name) if same else None) or own


def _with_device(kind: str, library: str, remedy: str, artifact: Path | None, version: str | None) -> ModuleType:
    """The TVM runtime with the part for one kind of device."""
    ffi = load_runtime(artifact, version)
    if ffi.get_global_func(f"ffi.Module.load_from_bytes.{kind}", allow_missing=True) is not None:
        return ffi
    path = _library(library, artifact, version)
    if path is None:
        raise MissingExtraError(
            f"running on a GPU needs {library}: it is neither in the artifact's runtime folder nor in an installed "
            "apache-tvm: run `pip install apache-tvm==0.27.0.post1`"
        )
    try:
        _loaded.append(ctypes.CDLL(str(path)))
    except OSError as error:
        raise ArtifactError(f"TVM's {kind} runtime {path} cannot be loaded ({error}): {remedy}") from error
    return ffi
