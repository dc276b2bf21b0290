"""OpenCL 1.2: the portable GPU target, ``opencl:generic``. Kernels travel as OpenCL C, which the device's driver compiles.

No runtime library for it comes with TVM's packages: it is for hosts that bring their own, and it is where the portable kernels
run for real in tests, on a CPU, through an OpenCL implementation that needs no GPU.
"""

from __future__ import annotations

from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm

from llmc.targets import gpu
from llmc.targets.base import GpuTarget, Target
from llmc.targets.gpu import compute_dtype, families, layouts, schedule
from llmc.targets.limits import OPENCL
from llmc.targets.link import linker

__all__ = ["KIND", "build", "check_tools", "compute_dtype", "export", "families", "known_specs", "layouts", "parse",
           "schedule", "tvm_target"]  # fmt: skip
KIND = "opencl"


def known_specs() -> list[str]:
    return [f"{KIND}:{name}" for name in OPENCL]


def parse(spec: str) -> GpuTarget:
    """The target that ``spec`` names. Raises UsageError for an unknown one."""
    return gpu.parse(spec, OPENCL, gpu.host_triple())


def check_tools(target: Target) -> None:
    linker(target)


def tvm_target(target: Target) -> tvm.target.Target:
    """OpenCL C, and plain code for the host that launches it."""
    assert isinstance(target, GpuTarget)
    device = {
        "kind": "opencl",
        "max_threads_per_block": target.max_threads,
        "max_shared_memory_per_block": target.shared_memory,
        "thread_warp_size": 1,  # no sub-groups: TVM's own reductions go through local memory too
    }
    return tvm.target.Target({**device, "host": gpu.host_code(target.triple)})


def build(module: tvm.IRModule, target: Target) -> Any:
    return gpu.build(module, tvm_target(target))


def export(executable: Any, target: Target, path: str) -> None:
    executable.export_library(path, fcompile=linker(target))
