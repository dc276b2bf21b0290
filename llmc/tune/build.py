"""Machine code of candidates: one kernel to run here, or many in one library to carry elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm

from llmc import targets
from llmc.errors import UsageError
from llmc.passes.choices import DEFAULT
from llmc.passes.one_region import repeated
from llmc.runtime.tensors import tensor, zeros
from llmc.schedules.cpu import team
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


@dataclass(frozen=True)
class Candidate:
    """``kernel``: a function of the call's operands and its result. ``steps``: by the number of calls, a function that makes so
    many as a step of a model does, of the operands and results of all of them."""

    kernel: Callable[..., Any]
    steps: dict[int, Callable[..., Any]]


def compile_one(
    family: Any,
    call: KernelCall,
    target: Target,
    config: dict[str, Any],
    sizes: Sequence[dict[str, int]] = (),
    repeats: Iterable[int] = (),
) -> Candidate:
    """One candidate. On a CPU whose steps are one parallel region it is what such a region calls, and there are steps of as many
    calls as each of ``repeats``, for ``sizes`` at most."""
    built = build(family, call, target, config)
    if not team.has_team(target):
        return Candidate(compile_kernels({"candidate": built}, target)["candidate"], {})
    specs = (*call.args, call.result)
    named = {d.partition("+")[0] for spec in specs for d in spec.shape if isinstance(d, str)}
    bounds = {name: max(size[name] for size in sizes) for name in sorted(named)}
    functions, workspaces = repeated(built, specs, [1, *repeats], bounds, target, call.phase == "decode", DEFAULT.chunks)
    module = compile_kernels(functions, target)
    steps = {count: _with_workspace(module[f"step_{count}"], size) for count, size in workspaces.items()}
    return Candidate(steps[1], steps)


def _with_workspace(step: Any, size: int) -> Callable[..., Any]:
    workspace = tensor(zeros((size,), "uint8"), "uint8")
    return lambda *tensors: step(*tensors, workspace)


def export_kernels(functions: dict[str, Any], target: Target, path: Path) -> None:
    """The kernels as one shared library, to be loaded with ``tvm_ffi.load_module``."""
    compile_kernels(functions, target).export_library(str(path), fcompile=linker(target))
