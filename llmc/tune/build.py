"""Machine code of candidates: one kernel to run here, or many in one library to carry elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm

from llmc import targets
from llmc.errors import UsageError
from llmc.schedules.parts import build
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target
from llmc.targets.link import linker


def family_named(name: str, target: Target) -> Any:
    """The kernel family of the target with this name. Raises UsageError if it has none."""
    families = {family.NAME: family for family in targets.module_for(target).families(target)}
    if name not in families:
        raise UsageError(f"target {target.name} has no kernel family {name!r}: it has {', '.join(sorted(families))}")
    return families[name]


def compile_kernels(functions: dict[str, Any], target: Target) -> Any:
    """A loaded module of ``{symbol: PrimFunc}``."""
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    return targets.module_for(target).build_kernels(module, target)


def compile_one(family: Any, call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """One candidate as a function of the call's operands and its result."""
    return compile_kernels({"candidate": build(family, call, target, config)}, target)["candidate"]


def export_kernels(functions: dict[str, Any], target: Target, path: Path) -> None:
    """The kernels as one shared library, to be loaded with ``tvm_ffi.load_module``."""
    compile_kernels(functions, target).export_library(str(path), fcompile=linker(target))
