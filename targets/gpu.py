"""What the targets of the portable kernels share: names out of the table of limits, the kernel families, the pipeline."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import relax

from llmc.errors import UsageError
from llmc.targets.base import GpuTarget, Target
from llmc.targets.gpu_pipeline import PIPELINE


def parse(spec: str, table: Mapping[str, Mapping[str, Any]], triple: str) -> GpuTarget:
    """The target ``kind:arch`` with the limits of ``table[arch]``. Raises UsageError listing what there is."""
    kind, _, arch = spec.partition(":")
    known = [f"{kind}:{name}" for name in table]
    if arch not in table:
        near = difflib.get_close_matches(arch, table, n=2, cutoff=0.5)
        hint = f"; nearest: {', '.join(f'{kind}:{n}' for n in near)}" if near else ""
        asked = f"unknown GPU architecture {arch!r} in target {spec!r}" if arch else f"target {spec!r} names no GPU architecture"
        raise UsageError(f"{asked}: there is {', '.join(known)}{hint}")
    limits = {"vector_bits": 128, "shared_arrays": table[arch]["shared_memory"], **table[arch]}
    return GpuTarget(name=f"{kind}:{arch}", kind=kind, triple=triple, mcpu=arch, features=(), **limits)


def host_triple() -> str:
    """The triple of Linux on this machine's kind of processor."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return f"{machine}-linux-gnu"


def host_code(triple: str) -> dict[str, Any]:
    """TVM's target for the code that launches kernels: the plainest processor of its kind."""
    return {"kind": "llvm", "mtriple": triple, "mcpu": "x86-64" if triple.startswith("x86_64") else "generic"}


def families(target: Target) -> Sequence[Any]:
    """The portable kernel families, in order of preference."""
    from llmc.schedules.gpu import FAMILIES

    return FAMILIES


def layouts(target: Target) -> Sequence[Any]:
    """The layouts of quantized weights, in order of preference."""
    from llmc.schedules.gpu import LAYOUTS

    return LAYOUTS


def schedule(function: Any, target: GpuTarget) -> Any:
    """Schedule a PrimFunc that Relax legalised and fused; see :mod:`llmc.schedules.gpu.elementwise`."""
    from llmc.schedules.gpu import elementwise

    return elementwise.schedule(function, target)


def compute_dtype(storage: str) -> str:
    """Activations have the dtype that matrices are stored in; matrix instructions take both operands in one dtype."""
    return storage


def build(module: tvm.IRModule, tvm_target: tvm.target.Target) -> Any:
    """The executable with its device code."""
    with tvm_target:
        return relax.build(module, tvm_target, relax_pipeline=None, tir_pipeline=PIPELINE)
