"""A compiled module as TVM's virtual machine: loaded, its devices set up, its phases looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.errors import ArtifactError

DL_CPU = 1
_POOLED_ALLOCATOR = 2


def load_vm(ffi: Any, path: Path, *devices: tuple[int, int]) -> Any:
    """The module at ``path`` on ``devices``, each (DLPack device type, index), the CPU last. Raises ArtifactError if damaged."""
    try:
        vm = ffi.load_module(str(path))["vm_load_executable"]()
        vm["vm_initialization"](*(v for kind, index in devices for v in (kind, index, _POOLED_ALLOCATOR)))
    except (RuntimeError, AttributeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:]
        raise ArtifactError(f"the compiled module {path} cannot be loaded ({''.join(reason)}): recompile the model") from error
    return vm


def vm_function(vm: Any, name: str) -> Any:
    """The phase ``name`` of a loaded module. Raises ArtifactError if it has none of that name."""
    try:
        return vm[name]
    except AttributeError as error:
        raise ArtifactError(f"the compiled module has no function {name}: recompile the model") from error
