"""Compile a kernel's generated CUDA for the CPU and launch it through the host code that TVM generated with it.

The host half of a PrimFunc (argument checks, shapes, grid) is compiled as it is for a real GPU. Where it launches a kernel it
calls a function by the kernel's name; here that is a Python function that runs the emulator.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import codegen_build, split_host_device_mods
from tvm.tirx.compilation_pipeline import get_tir_pipeline
from tvm_ffi.structural import structural_map

from llmc.targets import cuda, gpu
from llmc.targets.base import GpuTarget, Target
from tests.support.cuda_emulator.compiler import Kernel, build, kernels
from tests.support.cuda_emulator.dlpack import DeviceArray, TensorMap

HERE = Path(__file__).parent
HEADERS = ("emulator.h", "instructions.h", "matrix.h")
GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
CLUSTER = ("clusterCtaIdx.x", "clusterCtaIdx.y", "clusterCtaIdx.z")
BLOCK = ("threadIdx.x", "threadIdx.y", "threadIdx.z")
DYNAMIC_SHARED = "tirx.use_dyn_shared_memory"

_WIDTH = {
    "double": 8,
    "float": 4,
    "int": 4,
    "uint": 4,
    "half": 2,
    "ushort": 2,
    "nv_bfloat16": 2,
    "uchar": 1,
    "signed": 1,
    "int64_t": 8,
}
for _name in ("make_filled_simdgroup_matrix", "simdgroup_load", "simdgroup_store", "simdgroup_multiply_accumulate"):
    # Metal's instructions are functions of the emulator; its types are arrays of their elements.
    tirx.op.register_intrin_lowering(
        f"tirx.{_name}", target="cuda", f=lambda op, name=_name: tirx.call_extern("int32", f"emu_{name}", *op.args), level=20
    )


class Launchable:
    """A PrimFunc for a target, its host code compiled; its kernels are when they are first launched.

    A target of another kind than CUDA lends its limits: its warp, and what it allows a thread block, or RuntimeError is raised.
    """

    def __init__(self, function: Any, target: Target) -> None:
        self.target = target
        self._host, self._devices = _lower(function, target)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run on copies of ``arrays``, one for each argument, and return all of them after it.

        Results and buffers that are worked on in place come back changed. Raises RuntimeError for a PTX instruction the emulator
        does not know, and aborts the process with a message at a deadlock.
        """
        device_arrays = [DeviceArray(a) for a in arrays]
        with _launchers(self._devices, self.target):
            self._host["kernel"](*(a.tensor() for a in device_arrays))
        return [a.array for a in device_arrays]


def source(function: Any, target: Target) -> str:
    """The CUDA source TVM generates for ``function``, without compiling it."""
    return "\n".join(text for text, _ in _lower(function, target)[1])


def library(functions: Mapping[str, Any], target: Target) -> tuple[Path, dict[str, list[str]]]:
    """A shared library with ``run_<kernel>(arguments, grid, block, cluster, shared)`` for the kernels of PrimFuncs, by name, and
    the C types of each kernel's arguments."""
    assert isinstance(target, GpuTarget)
    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    ((text, _),) = _split(named, target)[1]
    found = kernels(text)
    return build(found.values(), target.warp_size), {name: list(kernel.types) for name, kernel in found.items()}


def _lower(function: Any, target: Target) -> tuple[Any, list[tuple[str, dict[str, list[str]]]]]:
    """The compiled host module, and for each device module its source and ``{kernel: launch parameters}``."""
    host, sources = _split({"kernel": function.with_attr("global_symbol", "kernel")}, target)
    assert isinstance(target, GpuTarget)
    return codegen_build(host, _as_cuda(target).host), sources


def _as_cuda(target: GpuTarget) -> tvm.target.Target:
    return cuda.tvm_target(
        target if target.kind == "cuda" else replace(target, kind="cuda", mcpu="sm_80", triple=gpu.host_triple())
    )


def _split(functions: Mapping[str, Any], target: Target) -> tuple[tvm.IRModule, list[tuple[str, dict[str, list[str]]]]]:
    """The host module, ready to be compiled, and what :func:`_lower` gives of the device's."""
    assert isinstance(target, GpuTarget)
    tvm_target = _as_cuda(target)
    lower, finish_host, finish_device = get_tir_pipeline(cuda.PIPELINE)
    with tvm_target:
        module = lower(tirx.transform.BindTarget(tvm_target)(tvm.IRModule({name: _by_address(f) for name, f in functions.items()})))
        host, devices = split_host_device_mods(module)
        sources = []
        for device_target, device in devices.items():
            launches = {
                str(f.attrs["global_symbol"]): [str(p) for p in f.attrs["tirx.kernel_launch_params"]]
                for f in device.functions.values()
            }
            sources.append((_generate(finish_device()(device), device_target), launches))
            _check_shared_memory(sources[-1][0], target)
        return finish_host()(host), sources


def _check_shared_memory(text: str, target: GpuTarget) -> None:
    """Raise RuntimeError for a kernel whose arrays in shared memory are more than the target allows a thread block."""
    for kernel in text.split("__global__")[1:]:
        arrays = re.findall(r"__shared__ (?:(?:__align__|alignas)\(\d+\) )?(\w+) \w+\[(\d+)\];", kernel)
        used = sum(_bytes(kind) * int(count) for kind, count in arrays)
        if used > target.shared_arrays:
            raise RuntimeError(f"a kernel has {used} bytes of shared memory, {target.name} allows {target.shared_arrays}")


def _bytes(kind: str) -> int:
    """Of a scalar type of CUDA, or of a vector of up to four of it (``"int4"``)."""
    return _WIDTH[kind] if kind in _WIDTH else _WIDTH[kind[:-1]] * int(kind[-1])


def _by_address(function: Any) -> Any:
    """Functions of vectors (matrix instructions: ``acc[at:] = f(a[i:], b[j:], acc[at:])``) as functions of their addresses, since
    TVM's CUDA code would call them for each element."""

    def address(buffer: Any, indices: Any) -> Any:
        return tirx.address_of(buffer[tuple(i.base if isinstance(i, tirx.Ramp) else i for i in indices)])

    def spell_out(store: Any) -> Any:
        call = store.value
        if not isinstance(call, tvm.ir.Call) or call.op.name != "tirx.call_pure_extern" or call.ty.dtype.lanes == 1:
            return store
        operands = [address(load.source, load.indices) for load in call.args[1:3]]
        result = address(store.buffer, store.indices)
        return tirx.Evaluate(tirx.call_extern("int32", call.args[0].value, result, *operands))

    return function.with_body(structural_map(function.body, [(tirx.BufferStore, spell_out)], order="post"))


def _generate(device: tvm.IRModule, target: tvm.target.Target) -> str:
    """CUDA source of a device module. Where TVM would call nvcc, it gets the source as the result of the compilation."""
    captured: list[str] = []

    def capture(text: str, *_: Any) -> bytes:
        captured.append(text)
        return text.encode()

    with _overridden({"tvm_callback_cuda_compile": capture}):
        module = codegen_build(device, target)
    return captured[0] if captured else str(module.inspect_source())


@contextmanager
def _overridden(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace global functions for a while."""
    before = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in functions}
    for name, f in functions.items():
        tvm_ffi.register_global_func(name, f, override=True)
    try:
        yield
    finally:
        for name, original in before.items():
            if original is None:
                tvm_ffi.registry.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, original, override=True)


@contextmanager
def _launchers(devices: Sequence[tuple[str, dict[str, list[str]]]], target: Target) -> Iterator[None]:
    """What host code calls: the kernels by name, the choice of a device, and the encoding of tensor maps."""
    functions: dict[str, Callable[..., Any]] = {
        "__tvm_set_device": lambda *_: None,
        "runtime.cuTensorMapEncodeTiled": TensorMap.encode,
        "device_api.cuda": tvm_ffi.get_global_func("device_api.cpu"),  # workspaces come from main memory
    }
    for text, launches in devices:
        assert isinstance(target, GpuTarget)
        found = kernels(text)
        for name, parameters in launches.items():
            functions[name] = _launcher(found[name], parameters, target)
    with _overridden(functions):
        yield


def _launcher(kernel: Kernel, parameters: list[str], target: GpuTarget) -> Callable[..., None]:
    name, types = kernel.name, kernel.types
    extents = [p for p in parameters if p in (*GRID, *CLUSTER, *BLOCK, DYNAMIC_SHARED)]

    def launch(*args: Any) -> None:
        values, launch_values = args[: len(types)], args[len(types) :]
        sizes = dict(zip(extents, (int(v) for v in launch_values), strict=True))
        held = [_argument(t, v) for t, v in zip(types, values, strict=True)]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*(ctypes.addressof(h) for h in held))
        shape = [sizes.get(axis, 1) for axis in (*GRID, *BLOCK)]
        cluster = int(np.prod([sizes.get(axis, 1) for axis in CLUSTER]))
        if int(np.prod(shape[3:])) > target.max_threads:
            raise RuntimeError(f"kernel {name} asks for {shape[3:]} threads, {target.name} allows {target.max_threads}")
        getattr(kernel.library(target.warp_size), f"run_{name}")(
            pointers, *shape, cluster, ctypes.c_size_t(sizes.get(DYNAMIC_SHARED, 0))
        )

    return launch


def _argument(kind: str, value: Any) -> Any:
    """One kernel argument as the C value of its declared type."""
    if kind == "CUtensorMap":
        return TensorMap.from_address(_address(value))
    if kind.endswith("*"):
        return ctypes.c_void_p(_address(value))
    simple = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint": ctypes.c_uint32, "float": ctypes.c_float}
    return simple[kind](value)


def _address(value: Any) -> int:
    return int(value.value or 0) if isinstance(value, ctypes.c_void_p) else int(value or 0)
