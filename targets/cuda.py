"""NVIDIA GPUs through CUDA: machine code for one architecture, built with or without a GPU or a driver.

============== ============================================================================================
spec           machine
============== ============================================================================================
``cuda``       the first GPU of this machine, asked from the driver; the name becomes ``cuda:sm_90a``
``cuda:sm_80`` that architecture, and later GPUs of the same major version; where nvcc is installed, newer ones too, from PTX
``cuda:sm_90a`` the ``a`` allows Hopper's own instructions (wgmma, TMA) and ties the code to compute capability 9.0
============== ============================================================================================
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import relax, tirx
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from llmc.errors import UsageError
from llmc.runtime.device import PTX, cuda_devices
from llmc.targets import cuda_tools, dependent_launch, gpu_pipeline
from llmc.targets.base import GpuTarget, Target
from llmc.targets.gpu import compute_dtype, layouts, schedule
from llmc.targets.limits import MMA
from llmc.targets.link import linker

__all__ = ["KIND", "build", "check_tools", "compute_dtype", "export", "families", "known_specs", "layouts", "parse",
           "schedule", "tvm_target"]  # fmt: skip
KIND = "cuda"
_KB = 1 << 10

SHARED_MEMORY = {
    "sm_80": 163 * _KB, "sm_86": 99 * _KB, "sm_87": 163 * _KB, "sm_89": 99 * _KB, "sm_90": 227 * _KB, "sm_90a": 227 * _KB,
    "sm_100": 227 * _KB, "sm_100a": 227 * _KB, "sm_103": 227 * _KB, "sm_120": 99 * _KB, "sm_120a": 99 * _KB,
}  # fmt: skip
"""The architectures with bfloat16 arithmetic, and the most shared memory one thread block may use on them (CUDA C++
Programming Guide, "Technical Specifications per Compute Capability")."""


def known_specs() -> list[str]:
    return ["cuda", *(f"cuda:{arch}" for arch in SHARED_MEMORY)]


def parse(spec: str) -> GpuTarget:
    """The target that ``spec`` names. Raises UsageError for an unknown architecture, and for ``cuda`` where no GPU answers."""
    _, _, arch = spec.partition(":")
    if not arch:
        arch = _local(spec)
    if arch not in SHARED_MEMORY:
        near = difflib.get_close_matches(arch, SHARED_MEMORY, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(f'cuda:{n}' for n in near)}" if near else ""
        raise UsageError(f"unknown GPU architecture {arch!r} in target {spec!r}: there is {', '.join(known_specs())}{hint}")
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return GpuTarget(
        name=f"cuda:{arch}",
        kind=KIND,
        triple=f"{machine}-linux-gnu",
        mcpu=arch,
        features=(PTX,) if cuda_tools.writes_ptx(arch) else (),
        vector_bits=128,
        vector_registers=255,
        shared_memory=SHARED_MEMORY[arch],
        matrix=MMA,
    )


def _local(spec: str) -> str:
    devices = cuda_devices()
    if not devices:
        raise UsageError(
            f"target {spec!r} asks for this machine's GPU, and no NVIDIA driver answers here: name the architecture of the machine "
            "that will run it, for example --target cuda:sm_90a (H100, H200), cuda:sm_89 (L4, RTX 40) or cuda:sm_80 (A100)"
        )
    gpu = devices[0]
    if gpu.compiled_for is None:
        raise UsageError(
            f"target {spec!r} asks for this machine's GPU, and {gpu.name} is {gpu.arch}, older than what llmc compiles for: "
            f"compile for the processor with --target cpu, or for another machine with one of {', '.join(known_specs()[1:])}"
        )
    return gpu.compiled_for


def check_tools(target: Target) -> None:
    linker(target)
    cuda_tools.compiler()


def tvm_target(target: Target) -> tvm.target.Target:
    """CUDA code for the architecture, and plain x86-64 or aarch64 code for the host that launches it."""
    assert isinstance(target, GpuTarget)
    device = {
        "kind": "cuda",
        "arch": target.mcpu,
        "max_threads_per_block": target.max_threads,
        "max_shared_memory_per_block": target.shared_memory,
        "thread_warp_size": target.warp_size,
    }
    host = {"kind": "llvm", "mtriple": target.triple, "mcpu": "x86-64" if target.triple.startswith("x86_64") else "generic"}
    return tvm.target.Target({**device, "host": host})


def families(target: Target) -> Sequence[Any]:
    """The CUDA kernel families, in order of preference."""
    from llmc.schedules.cuda import FAMILIES

    return FAMILIES


def build(module: tvm.IRModule, target: Target) -> Any:
    """The executable, its device code made by nvcc or NVRTC. Needs no GPU. Raises MissingExtraError without either or cudart."""
    cuda_tools.prepare()
    with tvm_target(target) as tvm_t:
        return relax.build(module, tvm_t, relax_pipeline=None, tir_pipeline=PIPELINE)


def build_kernels(module: tvm.IRModule, target: Target) -> Any:
    """Kernels alone as a loaded module: the machine code they have in :func:`build`."""
    from llmc.targets import cuda_tools

    cuda_tools.prepare()
    with tvm_target(target) as tvm_t:
        return tvm.compile(module, target=tvm_t, tir_pipeline=PIPELINE)


def export(executable: Any, target: Target, path: str) -> None:
    """Link a built module into one shared library; the device code is data in it."""
    executable.export_library(path, fcompile=linker(target))


PIPELINE = "llmc_cuda"


def _mixed_pipeline() -> tuple[Any, Any, Any]:
    """s_tir functions (generated and simple kernels) and TIRx functions (hand-written PTX) go through their own lowerings.

    They differ in how thread bindings and buffers are read; after the split into host and device functions they are alike.
    The first kind gets its programmatic dependent launches here; no kernel with one promises that its memory is its own.
    """
    s_tir_passes, finalize_host, finalize_device = get_tir_pipeline(gpu_pipeline.PIPELINE)
    tirx_passes, _, _ = get_tir_pipeline("tirx")

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        kinds: dict[bool, dict[Any, Any]] = {True: {}, False: {}}
        for var, function in module.functions.items():
            kinds[isinstance(function, tirx.PrimFunc) and not function.attrs.get("s_tir", False)][var] = function
        lowered = tvm.IRModule({}, attrs=module.attrs)
        if kinds[True]:
            lowered.update(tirx_passes(tvm.IRModule(kinds[True], attrs=module.attrs)))
        if kinds[False]:
            simple = dependent_launch.request(tvm.IRModule(kinds[False], attrs=module.attrs), tvm.target.Target.current())
            lowered.update(dependent_launch.obey(s_tir_passes(simple)))
        return dependent_launch.promise_nothing(lowered)

    return lower, finalize_host, finalize_device


register_tir_pipeline(PIPELINE, _mixed_pipeline)
