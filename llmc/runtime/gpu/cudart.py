"""CUDA's runtime library through ctypes: memory, copies, one stream, and graphs. What running a model on a GPU needs, no more.

:class:`Driver` is that interface; HIP's library (:mod:`llmc.runtime.gpu.hip`) has the same functions under names of its own, and
OpenCL's (:mod:`llmc.runtime.gpu.opencl`) others to the same end.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from llmc.errors import ArtifactError, InternalError, MissingExtraError
from llmc.runtime.library import find_cudart
from llmc.runtime.tensors import TensorHeader, dtype_code, storage_dtype

DL_CUDA = 2
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_NON_BLOCKING_STREAM, _CAPTURE_RELAXED, _NO_TIMING = 1, 2, 2
_UPLOAD_BYTES, _UPLOAD_THREADS = 8 << 20, 8


class _ManagedTensor(TensorHeader):
    """dlpack.h's DLManagedTensor."""

    _fields_ = (
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

    def __init__(self, ffi: Any, device: int, kind: int = DL_CUDA) -> None:
        """``kind``: DLPack's number of the kind of device."""
        self._ffi, self._device, self._kind = ffi, device, kind

    def tensor(self, address: int, shape: Sequence[int], dtype: str) -> Any:
        """A ``tvm_ffi.Tensor`` over the memory at ``address``, C-contiguous."""
        return self._ffi.from_dlpack(_new_capsule(self.managed(address, shape, *dtype_code(dtype)), b"dltensor", None))

    def managed(self, address: int, shape: Sequence[int], code: int, bits: int) -> int:
        """The address of a new DLManagedTensor of the dtype that DLPack's ``code`` and ``bits`` mean. Who gets it owns it."""
        # Header and shape are one block of the C library, whose own ``free`` is the deleter: a tensor may then die in any thread
        # and after the interpreter.
        block = _libc.malloc(ctypes.sizeof(_ManagedTensor) + 8 * len(shape))
        sizes = (ctypes.c_int64 * len(shape)).from_address(block + ctypes.sizeof(_ManagedTensor))
        sizes[:] = list(shape)
        header = _ManagedTensor.from_address(block)
        header.data, header.device_type, header.device_id = address, self._kind, self._device
        header.ndim, header.code, header.bits, header.lanes = len(shape), code, bits, 1
        header.shape, header.strides, header.byte_offset = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)), None, 0
        header.manager, header.deleter = None, ctypes.cast(_libc.free, ctypes.c_void_p)
        return int(block)


class Piece(NamedTuple):
    """``nbytes`` of a file from ``offset`` on, and the device ``address`` where they go."""

    address: int
    path: Path
    offset: int
    nbytes: int


def read_piece(descriptor: int, buffer: np.ndarray, piece: Piece) -> None:
    """Fill ``buffer`` from the file. Raises ArtifactError if it ends before."""
    view, done = buffer.data, 0
    while done < piece.nbytes:
        count = os.preadv(descriptor, [view[done:]], piece.offset + done)
        if count == 0:
            raise ArtifactError(f"the weights {piece.path} are truncated: copy the artifact again or recompile the model")
        done += count


class Driver(Protocol):
    """One device with one stream of work. Memory that is allocated here is freed by :meth:`close`.

    ``graphs``: whether :meth:`capture` can be called. Calls raise InternalError with the library's own words, except where they say
    otherwise.
    """

    device: int
    stream: int
    graphs: bool

    def use(self) -> None:
        """Make this GPU the calling thread's."""

    def turn(self) -> AbstractContextManager[None]:
        """Within it, the calling thread alone starts work on this GPU, and memory of calls that other models of the process have
        made is free. Every call of a compiled function is in one."""

    def memory(self) -> tuple[int, int]:
        """Bytes that are free on the GPU, and all of them."""

    def allocate(self, nbytes: int, zero: bool = False) -> int:
        """The address of ``nbytes`` of device memory, with ``zero`` filled with zeros in stream order."""

    def allocate_all(self, sizes: Sequence[int]) -> list[int]:
        """Addresses of memory that is needed together; sizes are multiples of what the device aligns to."""

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` gave."""

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory that the GPU copies from and to directly, as bytes."""

    def copy_in(self, target: int, source: np.ndarray) -> None:
        """Pinned host memory to the device, in stream order."""

    def copy_out(self, target: np.ndarray, source: int) -> None:
        """Device memory to pinned host memory, in stream order."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device memory to device memory, in stream order."""

    def clear(self, address: int, nbytes: int) -> None:
        """Fill device memory with zeros, in stream order."""

    def synchronize(self) -> None:
        """Wait until everything in the stream is done."""

    def event(self, timing: bool = False) -> int:
        """A mark for the stream. With ``timing`` it also keeps when it was passed."""

    def record(self, event: int) -> None:
        """Put ``event`` behind everything that is in the stream now."""

    def wait(self, event: int) -> None:
        """Wait until the device has passed ``event``; at once if it was never recorded."""

    def elapsed(self, start: int, end: int) -> float:
        """Seconds of the device between two events that it has passed."""

    def upload(self, pieces: Sequence[Piece]) -> None:
        """Parts of files to the device. Returns when all of it is there. Raises ArtifactError if a file has become shorter."""

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """The device work that ``work`` puts into the stream, as one graph: a function that starts it. Nothing runs yet."""

    def close(self) -> None:
        """Free all memory. Arrays and tensors over it must not be used afterwards."""


class Cuda:
    """CUDA's :class:`Driver`. A subclass may be another library with the same functions: ``prefix`` of their names, and ``renamed``
    where the rest of the name is another."""

    graphs = True
    stream = 0
    prefix = "cuda"
    _turns: ClassVar[dict[tuple[str, int], RLock]] = {}
    _latest: ClassVar[dict[tuple[str, int], Cuda]] = {}
    renamed: Mapping[str, str] = MappingProxyType({})

    def __init__(self, device: int) -> None:
        """Raises MissingExtraError without the library, ArtifactError if the GPU cannot be used."""
        self._library = self.open_library()
        getattr(self._library, self._name("GetErrorString")).restype = ctypes.c_char_p
        self.device = device
        self._allocations: list[int] = []
        self._pinned: list[int] = []
        self._events: list[int] = []
        try:
            self._call("SetDevice", device)
            stream = ctypes.c_void_p()
            self._call("StreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING_STREAM)
        except InternalError as error:
            raise ArtifactError(f"the GPU {device} cannot be used ({error}): see what {self.tool} says about it") from error
        self.stream = int(stream.value or 0)

    tool = "nvidia-smi"

    def open_library(self) -> ctypes.CDLL:
        """Raises MissingExtraError without libcudart 13."""
        path = find_cudart()
        if path is None:
            raise MissingExtraError(
                "running on a GPU needs libcudart.so.13, and it is not installed here: run `pip install nvidia-cuda-runtime==13.*`"
            )
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)

    def _name(self, function: str) -> str:
        return self.prefix + self.renamed.get(function, function)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, self._name(name))(*arguments)
        if status:
            getattr(self._library, self._name("GetLastError"))()  # a sticky error would be blamed on a later call
            words = getattr(self._library, self._name("GetErrorString"))(status).decode()
            raise InternalError(f"{self._name(name)}: {words}")

    def use(self) -> None:
        """See :meth:`Driver.use`."""
        self._call("SetDevice", self.device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See :meth:`Driver.turn`. What another one has put into its stream is done first: the models of a process take the memory
        of a call from one pool, which is in stream order for one stream alone."""
        with self._device_lock():
            self.use()
            before = self._latest.get(self._place)
            if before is not self:
                if before is not None:
                    before.synchronize()
                self._latest[self._place] = self
            yield

    @property
    def _place(self) -> tuple[str, int]:
        """What names the GPU in this process."""
        return self.prefix, self.device

    def _device_lock(self) -> RLock:
        return self._turns.setdefault(self._place, RLock())

    def memory(self) -> tuple[int, int]:
        """See :meth:`Driver.memory`."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("MemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, nbytes: int, zero: bool = False) -> int:
        """See :meth:`Driver.allocate`."""
        address = ctypes.c_void_p()
        self._call("Malloc", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        found = int(address.value or 0)
        self._allocations.append(found)
        if zero:
            self.clear(found, nbytes)
        return found

    def clear(self, address: int, nbytes: int) -> None:
        """See :meth:`Driver.clear`."""
        self._call("MemsetAsync", ctypes.c_void_p(address), 0, ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream))

    def allocate_all(self, sizes: Sequence[int]) -> list[int]:
        """See :meth:`Driver.allocate_all`: one allocation, cut up."""
        start = self.allocate(sum(sizes))
        return [start + offset for offset in accumulate(sizes, initial=0)][:-1]

    def free(self, address: int) -> None:
        """See :meth:`Driver.free`."""
        self._allocations.remove(address)
        self._call("Free", ctypes.c_void_p(address))

    def pinned(self, nbytes: int) -> np.ndarray:
        """See :meth:`Driver.pinned`."""
        address = ctypes.c_void_p()
        self._call("HostAlloc", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)), 0)
        self._pinned.append(int(address.value or 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address.value or 0)))

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        to, where = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("MemcpyAsync", to, where, ctypes.c_size_t(nbytes), kind, ctypes.c_void_p(stream))

    def copy_in(self, target: int, source: np.ndarray) -> None:
        """See :meth:`Driver.copy_in`."""
        self._copy(target, source.ctypes.data, source.nbytes, _HOST_TO_DEVICE, self.stream)

    def copy_out(self, target: np.ndarray, source: int) -> None:
        """See :meth:`Driver.copy_out`."""
        self._copy(target.ctypes.data, source, target.nbytes, _DEVICE_TO_HOST, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See :meth:`Driver.copy`."""
        self._copy(target, source, nbytes, _DEVICE_TO_DEVICE, self.stream)

    def synchronize(self) -> None:
        """See :meth:`Driver.synchronize`."""
        self._call("StreamSynchronize", ctypes.c_void_p(self.stream))

    def event(self, timing: bool = False) -> int:
        """See :meth:`Driver.event`."""
        handle = ctypes.c_void_p()
        self._call("EventCreateWithFlags", ctypes.byref(handle), 0 if timing else _NO_TIMING)
        self._events.append(int(handle.value or 0))
        return self._events[-1]

    def record(self, event: int) -> None:
        """See :meth:`Driver.record`."""
        self._call("EventRecord", ctypes.c_void_p(event), ctypes.c_void_p(self.stream))

    def wait(self, event: int) -> None:
        """See :meth:`Driver.wait`."""
        self._call("EventSynchronize", ctypes.c_void_p(event))

    def elapsed(self, start: int, end: int) -> float:
        """See :meth:`Driver.elapsed`."""
        milliseconds = ctypes.c_float()
        self._call("EventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return milliseconds.value / 1e3

    def upload(self, pieces: Sequence[Piece]) -> None:
        """See :meth:`Driver.upload`.

        Each of a few threads reads into a pinned buffer of its own and has it copied from there, so that reading and the transfers
        overlap. Reading costs one copy out of the page cache; touching a mapping would cost a page fault for every 4 KB beside it.
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
            self._call("StreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING_STREAM)
            try:
                for chunk in chunks[index :: len(buffers)]:
                    staged = buffers[index][: chunk.nbytes]
                    read_piece(files[chunk.path].fileno(), staged, chunk)
                    self._copy(chunk.address, staged.ctypes.data, chunk.nbytes, _HOST_TO_DEVICE, int(stream.value or 0))
                    self._call("StreamSynchronize", stream)
            finally:
                self._call("StreamDestroy", stream)

        try:
            with ThreadPoolExecutor(len(buffers)) as pool:
                list(pool.map(work, range(len(buffers))))
        finally:
            for file in files.values():
                file.close()
            for buffer in buffers:
                self._free_pinned(buffer.ctypes.data)

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """See :meth:`Driver.capture`."""
        stream, graph, executable = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("StreamBeginCapture", stream, _CAPTURE_RELAXED)
        try:
            work()
        except BaseException:
            with suppress(InternalError):  # the stream must leave capture mode; why it failed is already on its way
                self._call("StreamEndCapture", stream, ctypes.byref(graph))
            raise
        self._call("StreamEndCapture", stream, ctypes.byref(graph))
        self._call("GraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("GraphDestroy", graph)
        return lambda: self._call("GraphLaunch", executable, stream)

    def _free_pinned(self, address: int) -> None:
        self._pinned.remove(address)
        self._call("FreeHost", ctypes.c_void_p(address))

    def close(self) -> None:
        """See :meth:`Driver.close`."""
        with self._device_lock():
            self.synchronize()
            if self._latest.get(self._place) is self:
                del self._latest[self._place]
        for event in self._events:
            self._call("EventDestroy", ctypes.c_void_p(event))
        self._events = []
        for address in list(self._pinned):
            self._free_pinned(address)
        for address in self._allocations:
            self._call("Free", ctypes.c_void_p(address))
        self._allocations = []


def device_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * storage_dtype(dtype).itemsize
