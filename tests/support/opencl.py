"""Run kernels as OpenCL on this machine's processor: the device code as a driver compiles it, threads as it schedules them.

Any OpenCL whose device reads host memory will do (Debian: ``pocl-opencl-icd``). The host half of a kernel is TVM's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import codegen_build, split_host_device_mods
from tvm.tirx.compilation_pipeline import get_tir_pipeline

from llmc.targets import gpu, opencl
from llmc.targets.base import Target
from tests.support.cuda_emulator.dlpack import DeviceArray
from tests.support.cuda_emulator.runner import BLOCK, GRID, _address, _overridden

_OPENCL = 4  # DLDeviceType
_CPU_DEVICE = 1 << 1  # CL_DEVICE_TYPE_CPU
_SUCCESS = 0


@cache
def _device() -> tuple[ctypes.CDLL, Any, Any, Any]:
    """The library, and the device, context and queue of the first processor that it offers."""
    library = ctypes.CDLL("libOpenCL.so.1")
    for name in ("clCreateContext", "clCreateCommandQueue", "clCreateProgramWithSource", "clCreateKernel"):
        getattr(library, name).restype = ctypes.c_void_p
    platforms, device = (ctypes.c_void_p * 8)(), ctypes.c_void_p()
    count = ctypes.c_uint()
    library.clGetPlatformIDs(8, platforms, ctypes.byref(count))
    for platform in platforms[: count.value]:
        if (
            library.clGetDeviceIDs(ctypes.c_void_p(platform), ctypes.c_uint64(_CPU_DEVICE), 1, ctypes.byref(device), None)
            == _SUCCESS
        ):
            context = ctypes.c_void_p(library.clCreateContext(None, 1, ctypes.byref(device), None, None, None))
            queue = ctypes.c_void_p(library.clCreateCommandQueue(context, device, ctypes.c_uint64(0), None))
            return library, device, context, queue
    raise RuntimeError("no OpenCL device runs on this processor: install one, for example Debian's pocl-opencl-icd")


def run(function: Any, target: Target, *arrays: np.ndarray) -> list[np.ndarray]:
    """Run PrimFunc ``function`` on copies of ``arrays``, one for each of its arguments, and return all of them after it."""
    tvm_target = opencl.tvm_target(target)
    lower, finish_host, finish_device = get_tir_pipeline(gpu.PIPELINE)
    functions: dict[str, Callable[..., Any]] = {
        "__tvm_set_device": lambda *_: None,
        "device_api.opencl": tvm_ffi.get_global_func("device_api.cpu"),  # workspaces come from main memory
    }
    with tvm_target:
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        host, devices = split_host_device_mods(lower(tirx.transform.BindTarget(tvm_target)(module)))
        for device_target, device in devices.items():
            program = _compile(str(codegen_build(finish_device()(device), device_target).inspect_source()))
            for kernel in device.functions.values():
                name = str(kernel.attrs["global_symbol"])
                parameters = [str(p) for p in kernel.attrs["tirx.kernel_launch_params"]]
                functions[name] = _launcher(program, name, [str(p.ty) for p in kernel.params], parameters)
        compiled = codegen_build(finish_host()(host), tvm_target.host)
    held = [DeviceArray(a) for a in arrays]
    for array in held:
        array._managed.tensor.device_type = _OPENCL
    with _overridden(functions):
        compiled["kernel"](*(a.tensor() for a in held))
    return [a.array for a in held]


@cache
def _compile(source: str) -> Any:
    library, device, context, _ = _device()
    text = ctypes.c_char_p(source.encode())
    program = ctypes.c_void_p(library.clCreateProgramWithSource(context, 1, ctypes.byref(text), None, None))
    if library.clBuildProgram(program, 1, ctypes.byref(device), None, None, None) != _SUCCESS:
        log = ctypes.create_string_buffer(20000)
        library.clGetProgramBuildInfo(program, device, 0x1183, len(log), log, None)  # CL_PROGRAM_BUILD_LOG
        raise RuntimeError(f"the OpenCL compiler refuses a kernel: {log.value.decode()[:2000]}")
    return program


def _launcher(program: Any, name: str, types: list[str], parameters: list[str]) -> Callable[..., None]:
    library, _, _, queue = _device()
    kernel = ctypes.c_void_p(library.clCreateKernel(program, name.encode(), None))

    def launch(*args: Any) -> None:
        sizes = dict(zip(parameters, (int(v) for v in args[len(types) :]), strict=True))
        for i, (kind, value) in enumerate(zip(types, args, strict=False)):
            if isinstance(value, int):
                number = ctypes.c_int64(value) if "int64" in kind else ctypes.c_int32(value)
                status = library.clSetKernelArg(kernel, i, ctypes.c_size_t(ctypes.sizeof(number)), ctypes.byref(number))
            else:
                status = library.clSetKernelArgSVMPointer(kernel, i, ctypes.c_void_p(_address(value)))
            if status != _SUCCESS:
                raise RuntimeError(f"OpenCL refuses argument {i} of {name}: error {status}")
        local = [sizes.get(axis, 1) for axis in BLOCK]
        whole = [sizes.get(axis, 1) * size for axis, size in zip(GRID, local, strict=True)]
        shape = [(ctypes.c_size_t * 3)(*values) for values in (whole, local)]
        status = library.clEnqueueNDRangeKernel(queue, kernel, 3, None, *shape, 0, None, None) or library.clFinish(queue)
        if status != _SUCCESS:
            raise RuntimeError(f"OpenCL does not run {name}: error {status}")

    return launch
