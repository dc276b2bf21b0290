"""OpenCL through ctypes: the :class:`~llmc.runtime.gpu.launch.LaunchDriver` of any device whose memory has addresses.

That is coarse-grained shared virtual memory (OpenCL 2.0, "Shared Virtual Memory"): weights, pages and arguments lie at addresses,
as on other GPUs. Kernels are OpenCL C, which the device's driver compiles when a model is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from llmc.errors import ArtifactError, InternalError, MissingExtraError
from llmc.runtime.device import OPENCL_LIBRARY, opencl_devices, opencl_library
from llmc.runtime.gpu.cudart import Piece, read_piece
from llmc.runtime.gpu.device_code import POINTER, DeviceCode, KernelInfo
from llmc.runtime.gpu.launch import Launch, LaunchExecutor, argument_sizes
from llmc.runtime.host import memory
from llmc.runtime.tensors import zeros

DL_OPENCL = 4
_INSTALL = "install the OpenCL driver of your GPU, or one for the processor (Debian: pocl-opencl-icd)"

# cl.h
_PROFILING, _BUILD_LOG, _END = 1 << 1, 0x1183, 0x1282
_ALIGNMENT, _UPLOAD_BYTES = 128, 8 << 20  # the most alignment that an OpenCL must have
_LOG_BYTES, _LOG_SHOWN = 1 << 16, 500


class OpenCl:
    """OpenCL's :class:`~llmc.runtime.gpu.launch.LaunchDriver`. It has no graphs."""

    graphs = False
    forms = ("cl",)
    stream = 0

    def __init__(self, device: int) -> None:
        """Raises MissingExtraError without libOpenCL, ArtifactError if it has no such device with shared virtual memory."""
        library = opencl_library()
        if library is None:
            raise MissingExtraError(f"running on OpenCL needs {OPENCL_LIBRARY}, and it is not installed here: {_INSTALL}")
        devices = opencl_devices()
        if device >= len(devices):
            raise ArtifactError(
                f"OpenCL has {len(devices)} devices with shared virtual memory here, and number {device} is none: {_INSTALL}"
            )
        self._library, self.device, self.described = library, device, devices[device]
        self._id = ctypes.c_void_p(self.described.handle)
        status = ctypes.c_int()
        self._context = ctypes.c_void_p(library.clCreateContext(None, 1, ctypes.byref(self._id), None, None, ctypes.byref(status)))
        self._check("clCreateContext", status.value)
        self._queue = ctypes.c_void_p(
            library.clCreateCommandQueue(self._context, self._id, ctypes.c_uint64(_PROFILING), ctypes.byref(status))
        )
        self._check("clCreateCommandQueue", status.value)
        self._allocations: dict[int, int] = {}
        self._pinned: list[np.ndarray] = []
        self._events: list[ctypes.c_void_p] = []

    @staticmethod
    def _check(name: str, status: int) -> None:
        if status:
            raise InternalError(f"{name}: error {status}")

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def use(self) -> None:
        """See :meth:`Driver.use`: a queue is any thread's."""

    def turn(self) -> AbstractContextManager[None]:
        """See :meth:`Driver.turn`: the memory of a model's calls is its own."""
        return nullcontext()

    def memory(self) -> tuple[int, int]:
        """See :meth:`Driver.memory`. OpenCL does not tell what others have taken of a GPU's."""
        total = self.described.memory
        taken = sum(self._allocations.values())
        return (total - taken if self.described.gpu else min(total - taken, memory().available // 2)), total

    def allocate(self, nbytes: int, zero: bool = False) -> int:
        """See :meth:`Driver.allocate`."""
        size = max(nbytes, 1)
        address = self._library.clSVMAlloc(self._context, ctypes.c_uint64(0), ctypes.c_size_t(size), ctypes.c_uint(_ALIGNMENT))
        if not address:
            raise InternalError(f"clSVMAlloc: no memory for {size} bytes")
        self._allocations[int(address)] = size
        if zero:
            self.clear(int(address), size)
        return int(address)

    def clear(self, address: int, nbytes: int) -> None:
        """See :meth:`Driver.clear`."""
        pattern = ctypes.c_uint8(0)
        where, one = ctypes.c_void_p(address), ctypes.c_size_t(1)
        self._call("clEnqueueSVMMemFill", self._queue, where, ctypes.byref(pattern), one, ctypes.c_size_t(nbytes), 0, None, None)

    def allocate_all(self, sizes: Sequence[int]) -> list[int]:
        """See :meth:`Driver.allocate_all`: one by one, since a device bounds the size of an allocation."""
        return [self.allocate(size) for size in sizes]

    def free(self, address: int) -> None:
        """See :meth:`Driver.free`."""
        self.synchronize()
        del self._allocations[address]
        self._library.clSVMFree(self._context, ctypes.c_void_p(address))

    def pinned(self, nbytes: int) -> np.ndarray:
        """See :meth:`Driver.pinned`: plain memory, which OpenCL copies from and to as well."""
        self._pinned.append(zeros((nbytes,), "uint8"))
        return self._pinned[-1]

    def _copy(self, target: int, source: int, nbytes: int, wait: bool = False) -> None:
        to, where, size = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(nbytes)
        self._call("clEnqueueSVMMemcpy", self._queue, ctypes.c_uint(wait), to, where, size, 0, None, None)

    def copy_in(self, target: int, source: np.ndarray) -> None:
        """See :meth:`Driver.copy_in`."""
        self._copy(target, source.ctypes.data, source.nbytes)

    def copy_out(self, target: np.ndarray, source: int) -> None:
        """See :meth:`Driver.copy_out`."""
        self._copy(target.ctypes.data, source, target.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See :meth:`Driver.copy`."""
        self._copy(target, source, nbytes)

    def synchronize(self) -> None:
        """See :meth:`Driver.synchronize`."""
        self._call("clFinish", self._queue)

    def event(self, timing: bool = False) -> int:
        """See :meth:`Driver.event`."""
        self._events.append(ctypes.c_void_p())
        return len(self._events) - 1

    def record(self, event: int) -> None:
        """See :meth:`Driver.record`."""
        self._release(event)
        self._call("clEnqueueMarkerWithWaitList", self._queue, 0, None, ctypes.byref(self._events[event]))

    def wait(self, event: int) -> None:
        """See :meth:`Driver.wait`."""
        if self._events[event]:
            self._call("clWaitForEvents", 1, ctypes.byref(self._events[event]))

    def elapsed(self, start: int, end: int) -> float:
        """See :meth:`Driver.elapsed`."""
        times = []
        for event in (start, end):
            value = ctypes.c_uint64()
            size = ctypes.c_size_t(8)
            self._call("clGetEventProfilingInfo", self._events[event], _END, size, ctypes.byref(value), None)
            times.append(value.value)
        return (times[1] - times[0]) / 1e9

    def _release(self, event: int) -> None:
        if self._events[event]:
            self._library.clReleaseEvent(self._events[event])
            self._events[event] = ctypes.c_void_p()

    def upload(self, pieces: Sequence[Piece]) -> None:
        """See :meth:`Driver.upload`."""
        staged = zeros((_UPLOAD_BYTES,), "uint8")
        for piece in pieces:
            with piece.path.open("rb") as file:
                for start in range(0, piece.nbytes, _UPLOAD_BYTES):
                    count = min(_UPLOAD_BYTES, piece.nbytes - start)
                    part = Piece(piece.address + start, piece.path, piece.offset + start, count)
                    read_piece(file.fileno(), staged[:count], part)
                    self._copy(part.address, staged.ctypes.data, count, wait=True)

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """OpenCL has no graphs. Raises InternalError."""
        raise InternalError("OpenCL cannot record graphs")

    def load_code(self, code: DeviceCode) -> dict[str, Launch]:
        """See :meth:`LaunchDriver.load_code`."""
        text, status = ctypes.c_char_p(code.code), ctypes.c_int()
        program = ctypes.c_void_p(
            self._library.clCreateProgramWithSource(self._context, 1, ctypes.byref(text), None, ctypes.byref(status))
        )
        self._check("clCreateProgramWithSource", status.value)
        if status := self._library.clBuildProgram(program, 1, ctypes.byref(self._id), None, None, None):
            log = ctypes.create_string_buffer(_LOG_BYTES)
            self._library.clGetProgramBuildInfo(program, self._id, _BUILD_LOG, ctypes.c_size_t(len(log)), log, None)
            reason = " ".join(log.value.decode(errors="replace").split())[:_LOG_SHOWN]
            raise ArtifactError(
                f"the OpenCL driver of {self.described.name} does not compile the model's kernels (error {status}: {reason}): "
                "update the driver, or use another target"
            )
        return {info.name: self._kernel(program, info) for info in code.kernels}

    def _kernel(self, program: ctypes.c_void_p, info: KernelInfo) -> Launch:
        status = ctypes.c_int()
        kernel = ctypes.c_void_p(self._library.clCreateKernel(program, info.name.encode(), ctypes.byref(status)))
        self._check("clCreateKernel", status.value)
        slots = (ctypes.c_uint64 * max(len(info.types), 1))()
        sizes = argument_sizes(info)
        pointers = [code == POINTER for code, _ in info.types]
        places = [ctypes.c_void_p(ctypes.addressof(slots) + 8 * i) for i in range(len(info.types))]
        whole, local = (ctypes.c_size_t * 3)(), (ctypes.c_size_t * 3)()

        def launch(values: list[int], grid: list[int], block: list[int], shared: int) -> None:
            slots[: len(values)] = values  # type: ignore[assignment]  # ctypes takes numbers
            for i, value in enumerate(values):
                if pointers[i]:
                    self._call("clSetKernelArgSVMPointer", kernel, i, ctypes.c_void_p(value))
                else:
                    self._call("clSetKernelArg", kernel, i, ctypes.c_size_t(sizes[i]), places[i])
            local[:] = block  # type: ignore[assignment]
            whole[:] = [g * b for g, b in zip(grid, block, strict=True)]
            self._call("clEnqueueNDRangeKernel", self._queue, kernel, 3, None, whole, local, 0, None, None)

        return launch

    def close(self) -> None:
        """See :meth:`Driver.close`."""
        self.synchronize()
        for event in range(len(self._events)):
            self._release(event)
        for address in list(self._allocations):
            self.free(address)
        self._pinned = []


class OpenClExecutor(LaunchExecutor):
    """A :class:`LaunchExecutor` over a module that llmc compiled for OpenCL."""

    module_kind = "opencl"
    device_type = DL_OPENCL

    @classmethod
    def open_driver(cls, device: int) -> OpenCl:
        """See :meth:`GpuExecutor.open_driver`."""
        return OpenCl(device)
