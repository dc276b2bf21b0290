"""AMD GPUs through LLVM: code objects (hsaco) for one architecture, built without ROCm.

================ ==========================================================================================
spec             machine
================ ==========================================================================================
``rocm:gfx90a``  Instinct MI210, MI250
``rocm:gfx942``  Instinct MI300A, MI300X, MI325X
``rocm:gfx1100`` Radeon RX 7900, PRO W7900
``rocm:gfx1201`` Radeon RX 9070
================ ==========================================================================================

TVM's LLVM generates the object; ``ld.lld`` out of the ziglang package links it. No device library is linked in: every function
that kernels call has an instruction or is expanded by LLVM.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
import tvm.support.rocm  # registers TVM's own callbacks, so that ours, registered later, replace them
import tvm_ffi
from tvm import tirx

from llmc.errors import InternalError, MissingExtraError
from llmc.targets import gpu, native_messages
from llmc.targets.base import GpuTarget, Target
from llmc.targets.gpu import compute_dtype, families, layouts, schedule
from llmc.targets.limits import ROCM
from llmc.targets.link import linker

__all__ = ["KIND", "build", "check_tools", "compute_dtype", "export", "families", "known_specs", "layouts", "parse",
           "schedule", "tvm_target"]  # fmt: skip
KIND = "rocm"

Expr = Any
_NO_DEVICE_HERE = ("Unable to detect ROCm version", "Cannot get maximum number of threads")
"""What TVM warns of, for every target and every kernel, where it finds no AMD GPU to ask. The targets' limits say both."""


def known_specs() -> list[str]:
    return [f"{KIND}:{arch}" for arch in ROCM]


def parse(spec: str) -> GpuTarget:
    """The target that ``spec`` names. Raises UsageError for an unknown architecture."""
    return gpu.parse(spec, ROCM, gpu.host_triple())


def check_tools(target: Target) -> None:
    linker(target)
    if importlib.util.find_spec("ziglang") is None:
        raise MissingExtraError(f"target {target.name} needs the ziglang linker: run `pip install ziglang==0.17.1`")


def tvm_target(target: Target) -> tvm.target.Target:
    """Code for the architecture, and plain code for the host that launches it."""
    assert isinstance(target, GpuTarget)
    _prepare()
    device = {
        "kind": "rocm",
        "mcpu": target.mcpu,
        "mtriple": "amdgcn-amd-amdhsa-hcc",
        "max_threads_per_block": target.max_threads,
        "max_shared_memory_per_block": target.shared_memory,
        "thread_warp_size": target.warp_size,
    }
    with native_messages.without(_NO_DEVICE_HERE):
        return tvm.target.Target({**device, "host": gpu.host_code(target.triple)})


def build(module: tvm.IRModule, target: Target) -> Any:
    """The executable, its code objects linked. Raises MissingExtraError without ziglang."""
    check_tools(target)
    with native_messages.without(_NO_DEVICE_HERE):
        return gpu.build(module, tvm_target(target))


def export(executable: Any, target: Target, path: str) -> None:
    """Link a built module into one shared library; the code objects are data in it."""
    executable.export_library(path, fcompile=linker(target))


@cache
def _prepare() -> None:
    """Replace what TVM expects of a ROCm installation, and lower what its ROCm backend lacks."""
    tvm_ffi.register_global_func("tvm_callback_rocm_link", _link, override=True)
    tvm_ffi.register_global_func("tvm_callback_rocm_bitcode_path", lambda *_: [], override=True)
    tirx.op.register_intrin_lowering("tirx.tvm_warp_shuffle_xor", target=KIND, f=_exchange, level=20)
    tirx.op.register_intrin_lowering("tirx.call_pure_extern", target=KIND, f=_multiply, level=20)


def _link(code: Any) -> bytearray:
    """An object file as a code object."""
    with tempfile.TemporaryDirectory(prefix="llmc-rocm-") as folder:
        source, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.hsaco"
        source.write_bytes(bytes(code))
        command = [sys.executable, "-m", "ziglang", "ld.lld", "--no-undefined", "-shared", str(source), "-o", str(linked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InternalError(f"linking AMD GPU code failed: {done.stderr.strip()[-800:]}")
        return bytearray(linked.read_bytes())


_MATRIX: dict[str, tuple[str, str, int]] = {
    "mfma_f32_16x16x16_bf16": ("llvm.amdgcn.mfma.f32.16x16x16bf16.1k", "int16", 3),
    "mfma_f32_16x16x16_f16": ("llvm.amdgcn.mfma.f32.16x16x16f16", "float16", 3),
    "wmma_f32_16x16x16_bf16_w16": ("llvm.amdgcn.wmma.f32.16x16x16.bf16", "int16", 0),
    "wmma_f32_16x16x16_f16_w16": ("llvm.amdgcn.wmma.f32.16x16x16.f16", "float16", 0),
    "wmma_f32_16x16x16_bf16_w8": ("llvm.amdgcn.wmma.f32.16x16x16.bf16", "int16", 0),
    "wmma_f32_16x16x16_f16_w8": ("llvm.amdgcn.wmma.f32.16x16x16.f16", "float16", 0),
}
"""Matrix instructions by the names of :mod:`llmc.targets.limits`: LLVM's intrinsic, the elements of its operands, and how many
modifiers follow them (of which none is used)."""


def _multiply(op: Expr) -> Expr:
    """A matrix instruction over vectors of words as LLVM's intrinsic over vectors of 16-bit elements; other calls as they are."""
    name = str(op.args[0].value)
    if name not in _MATRIX:
        return op
    intrinsic, element, modifiers = _MATRIX[name]
    a, b = (tirx.reinterpret(f"{element}x{2 * value.ty.dtype.lanes}", value) for value in op.args[1:3])
    unused = [tirx.const(0, "int32")] * modifiers
    return tirx.call_llvm_pure_intrin(str(op.ty.dtype), intrinsic, a, b, op.args[3], *unused)


_SWIZZLE_REACH = 32
"""``ds_swizzle`` exchanges within 32 lanes, in waves of 64 too."""


def _exchange(op: Expr) -> Expr:
    """``tvm_warp_shuffle_xor(mask, value, distance, ...)``: the value of the lane whose number differs by ``distance``, a power of
    two. LLVM AMDGPU usage guide: ds_swizzle in bit mask mode has the xor mask in bits 10 to 14 and the and mask in bits 0 to 4."""
    value, distance = op.args[1], int(op.args[2])
    bits = value if str(value.ty.dtype) == "int32" else tirx.reinterpret("int32", value)
    if distance < _SWIZZLE_REACH:
        pattern = tirx.const(distance << 10 | 0x1F, "int32")
        moved = tirx.call_llvm_pure_intrin("int32", "llvm.amdgcn.ds.swizzle", bits, pattern)
    else:
        zero, every = tirx.const(0, "int32"), tirx.const(-1, "int32")
        low = tirx.call_llvm_pure_intrin("int32", "llvm.amdgcn.mbcnt.lo", every, zero)
        lane = tirx.call_llvm_pure_intrin("int32", "llvm.amdgcn.mbcnt.hi", every, low)
        address = (lane ^ tirx.const(distance, "int32")) * 4
        moved = tirx.call_llvm_pure_intrin("int32", "llvm.amdgcn.ds.bpermute", address, bits)
    return moved if str(value.ty.dtype) == "int32" else tirx.reinterpret(str(value.ty.dtype), moved)
