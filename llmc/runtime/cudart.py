"""CUDA's runtime library through ctypes: memory, copies, one stream, and graphs. What running a model on a GPU needs, no more."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc.errors import ArtifactError, InternalError, MissingExtraError
from llmc.runtime.library import find_cudart
from llmc.runtime.tensors import dtype_code, storage_dtype

DL_CUDA = 2
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_NON_BLOCKING_STREAM, _CAPTURE_RELAXED, _NO_TIMING = 1, 2, 2
_UPLOAD_BYTES, _UPLOAD_THREADS = 8 << 20, 8


class _ManagedTensor(ctypes.Structure):
    """dlpack.h's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)


class DeviceTensors:
    """Tensors over device memory for compiled modules. The memory is the caller's and must outlive them."""

    def __init__(self, ffi: Any, device: int) -> None:
        self._ffi, self._device = ffi, device

    def tensor(self, address: int, shape: Sequence[int], dtype: str) -> Any:
        """A ``tvm_ffi.Tensor`` over the memory at ``address``, C-contiguous."""
        code, bits = dtype_code(dtype)
        # Header and shape are one block of the C library, whose own ``free`` is the deleter: a tensor may then die in any thread
        # and after the interpreter.
        block = _libc.malloc(ctypes.sizeof(_ManagedTensor) + 8 * len(shape))
        sizes = (ctypes.c_int64 * len(shape)).from_address(block + ctypes.sizeof(_ManagedTensor))
        sizes[:] = list(shape)
        header = _ManagedTensor.from_address(block)
        header.data, header.device_type, header.device_id = address, DL_CUDA, self._device
        header.ndim, header.code, header.bits, header.lanes = len(shape), code, bits, 1
        header.shape, header.strides, header.byte_offset = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)), None, 0
        header.manager, header.deleter = None, ctypes.cast(_libc.free, ctypes.c_void_p)
        return self._ffi.from_dlpack(_new_capsule(block, b"dltensor", None))


class Piece(NamedTuple):
    """``nbytes`` of a file from ``offset`` on, and the device ``address`` where they go."""

    address: int
    path: Path
    offset: int
    nbytes: int


def _read(descriptor: int, buffer: np.ndarray, piece: Piece) -> None:
    """Fill ``buffer`` from the file. Raises ArtifactError if it ends before."""
    view, done = buffer.data, 0
    while done < piece.nbytes:
        count = os.preadv(descriptor, [view[done:]], piece.offset + done)
        if count == 0:
            raise ArtifactError(f"the weights {piece.path} are truncated: copy the artifact again or recompile the model")
        done += count


class Cuda:
    """One GPU with one stream. Memory that is allocated here is freed by :meth:`close`.

    Calls raise InternalError with CUDA's own words, except where they say otherwise.
    """

    def __init__(self, device: int) -> None:
        """Raises MissingExtraError without libcudart 13, ArtifactError if the GPU cannot be used."""
        path = find_cudart()
        if path is None:
            raise MissingExtraError(
                "running on a GPU needs libcudart.so.13, and it is not installed here: run `pip install nvidia-cuda-runtime==13.*`"
            )
        self._library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self.device = device
        self._allocations: list[int] = []
        self._pinned: list[int] = []
        self._events: list[int] = []
        try:
            self._call("cudaSetDevice", device)
            stream = ctypes.c_void_p()
            self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING_STREAM)
        except InternalError as error:
            raise ArtifactError(f"the GPU {device} cannot be used ({error}): see what nvidia-smi says about it") from error
        self.stream = int(stream.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetLastError()  # a sticky error would be blamed on a later call
            raise InternalError(f"{name}: {self._library.cudaGetErrorString(status).decode()}")

    def use(self) -> None:
        """Make this GPU the calling thread's."""
        self._call("cudaSetDevice", self.device)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free on the GPU, and all of them."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, nbytes: int, zero: bool = False) -> int:
        """The address of ``nbytes`` of device memory, with ``zero`` filled with zeros in stream order."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        found = int(address.value or 0)
        self._allocations.append(found)
        if zero:
            self._call("cudaMemsetAsync", address, 0, ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream))
        return found

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` gave."""
        self._allocations.remove(address)
        self._call("cudaFree", ctypes.c_void_p(address))

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory that the GPU copies from and to directly, as bytes."""
        address = ctypes.c_void_p()
        self._call("cudaMallocHost", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        self._pinned.append(int(address.value or 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address.value or 0)))

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        to, where = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", to, where, ctypes.c_size_t(nbytes), kind, ctypes.c_void_p(stream))

    def copy_in(self, target: int, source: np.ndarray) -> None:
        """Pinned host memory to the device, in stream order."""
        self._copy(target, source.ctypes.data, source.nbytes, _HOST_TO_DEVICE, self.stream)

    def copy_out(self, target: np.ndarray, source: int) -> None:
        """Device memory to pinned host memory, in stream order."""
        self._copy(target.ctypes.data, source, target.nbytes, _DEVICE_TO_HOST, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device memory to device memory, in stream order."""
        self._copy(target, source, nbytes, _DEVICE_TO_DEVICE, self.stream)

    def synchronize(self) -> None:
        """Wait until everything in the stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def event(self, timing: bool = False) -> int:
        """A mark for the stream. With ``timing`` it also keeps when it was passed."""
        handle = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(handle), 0 if timing else _NO_TIMING)
        self._events.append(int(handle.value or 0))
        return self._events[-1]

    def record(self, event: int) -> None:
        """Put ``event`` behind everything that is in the stream now."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(self.stream))

    def wait(self, event: int) -> None:
        """Wait until the device has passed ``event``; at once if it was never recorded."""
        self._call("cudaEventSynchronize", ctypes.c_void_p(event))

    def elapsed(self, start: int, end: int) -> float:
        """Seconds of the device between two events that it has passed."""
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return milliseconds.value / 1e3

    def upload(self, pieces: Sequence[Piece]) -> None:
        """Parts of files to the device. Returns when all of it is there.

        Each of a few threads reads into a pinned buffer of its own and has it copied from there, so that reading and the transfers
        overlap. Reading costs one copy out of the page cache; touching a mapping would cost a page fault for every 4 KB beside it.
        Raises ArtifactError if a file has become shorter.
        """
        chunks = [
            Piece(p.address + start, p.path, p.offset + start, min(_UPLOAD_BYTES, p.nbytes - start))
            for p in pieces
            for start in range(0, p.nbytes, _UPLOAD_BYTES)
        ]
        files = {path: path.open("rb") for path in {p.path for p in pieces}}
        buffers = [self.pinned(_UPLOAD_BYTES) for _ in range(min(_UPLOAD_THREADS, max(len(chunks), 1)))]

        def work(index: int) -> None:
            self.use()
            stream = ctypes.c_void_p()
            self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING_STREAM)
            try:
                for chunk in chunks[index :: len(buffers)]:
                    staged = buffers[index][: chunk.nbytes]
                    _read(files[chunk.path].fileno(), staged, chunk)
                    self._copy(chunk.address, staged.ctypes.data, chunk.nbytes, _HOST_TO_DEVICE, int(stream.value or 0))
                    self._call("cudaStreamSynchronize", stream)
            finally:
                self._call("cudaStreamDestroy", stream)

        try:
            with ThreadPoolExecutor(len(buffers)) as pool:
                list(pool.map(work, range(len(buffers))))
        finally:
            for file in files.values():
                file.close()
            for buffer in buffers:
                self._free_pinned(buffer.ctypes.data)

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """The device work that ``work`` puts into the stream, as one graph: a function that starts it. Nothing runs yet."""
        stream, graph, executable = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_RELAXED)
        try:
            work()
        except BaseException:
            with suppress(InternalError):  # the stream must leave capture mode; why it failed is already on its way
                self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
            raise
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cudaGraphDestroy", graph)
        return lambda: self._call("cudaGraphLaunch", executable, stream)

    def _free_pinned(self, address: int) -> None:
        self._pinned.remove(address)
        self._call("cudaFreeHost", ctypes.c_void_p(address))

    def close(self) -> None:
        """Free all memory. Arrays and tensors over it must not be used afterwards."""
        self.synchronize()
        for event in self._events:
            self._call("cudaEventDestroy", ctypes.c_void_p(event))
        self._events = []
        for address in list(self._pinned):
            self._free_pinned(address)
        for address in self._allocations:
            self._call("cudaFree", ctypes.c_void_p(address))
        self._allocations = []


def device_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * storage_dtype(dtype).itemsize
