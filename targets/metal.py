"""Apple GPUs through Metal: shader source in a library for macOS on arm64, linked on any machine without Apple's SDK.

================ ==========================================================================================
spec             machine
================ ==========================================================================================
``metal:apple7`` M1, A14
``metal:apple8`` M2, A15, A16
``metal:apple9`` M3, M4, A17
================ ==========================================================================================

The library holds Metal Shading Language: the system's own compiler translates it when the module is loaded, as for every
Metal program that ships without a metallib.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import tirx

from llmc.targets import gpu
from llmc.targets.base import GpuTarget, Target
from llmc.targets.gpu import compute_dtype, families, layouts, schedule
from llmc.targets.limits import METAL
from llmc.targets.link import linker

__all__ = ["KIND", "build", "check_tools", "compute_dtype", "export", "families", "known_specs", "layouts", "parse",
           "schedule", "tvm_target"]  # fmt: skip
KIND = "metal"
TRIPLE = "arm64-apple-macos13.0"

Expr = Any


def known_specs() -> list[str]:
    return [f"{KIND}:{family}" for family in METAL]


def parse(spec: str) -> GpuTarget:
    """The target that ``spec`` names. Raises UsageError for an unknown GPU family."""
    return gpu.parse(spec, METAL, TRIPLE)


def check_tools(target: Target) -> None:
    linker(target)


def tvm_target(target: Target) -> tvm.target.Target:
    """Metal Shading Language, and arm64 code for the host that launches it."""
    assert isinstance(target, GpuTarget)
    _prepare()
    device = {
        "kind": "metal",
        "max_threads_per_block": target.max_threads,
        "max_shared_memory_per_block": target.shared_memory,
        "thread_warp_size": target.warp_size,
    }
    return tvm.target.Target({**device, "host": {**gpu.host_code(target.triple), "mcpu": "apple-m1"}})


def build(module: tvm.IRModule, target: Target) -> Any:
    return gpu.build(module, tvm_target(target))


def export(executable: Any, target: Target, path: str) -> None:
    """Link a built module into one dynamic library. Raises MissingExtraError without ziglang."""
    executable.export_library(path, fcompile=linker(target))


@cache
def _prepare() -> None:
    """Lower what TVM's Metal backend lacks."""
    tirx.op.register_intrin_lowering("tirx.tvm_warp_shuffle_xor", target=KIND, f=_exchange, level=20)


def _exchange(op: Expr) -> Expr:
    """``tvm_warp_shuffle_xor(mask, value, distance, ...)`` as Metal's ``simd_shuffle_xor`` (MSL specification, 6.9.2)."""
    value, distance = op.args[1], int(op.args[2])
    return tirx.call_pure_extern(str(value.ty.dtype), "simd_shuffle_xor", value, tirx.const(distance, "uint16"))
