"""Where kernels are timed: the CPU or one GPU, with inputs that are not in its caches. Needs ``tvm_ffi`` and NumPy alone.

A model reads every weight once per step, so a kernel that is called again and again on one weight would be timed out of a cache it
never finds warm. A call is therefore timed over copies of its inputs that together are larger than the caches, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.errors import LlmcError
from llmc.runtime.device import cuda_devices
from llmc.runtime.gpu.cudart import Cuda, DeviceTensors, device_bytes
from llmc.runtime.host import default_threads
from llmc.runtime.host import host as this_host
from llmc.runtime.library import load_cuda_runtime, load_runtime
from llmc.runtime.tensors import storage_dtype, tensor, zeros
from llmc.runtime.threads import use_threads

Call = Callable[..., Any]
Set = list[Any]
STAGED = 16 << 20
"""Bytes that go to a GPU at once."""


class CpuDevice:
    """This machine's processor. ``rotated``: bytes of inputs to go through before one comes again."""

    rotated = 64 << 20
    budget = 3e-3
    """Seconds of one timing, at least one round over all sets."""

    def __init__(self) -> None:
        use_threads(load_runtime(), default_threads())
        self.name = this_host().cpu_name

    def empty(self, shape: Sequence[int], dtype: str) -> tuple[np.ndarray, Any]:
        """A buffer and the tensor over it."""
        array = zeros(tuple(shape), dtype)
        return array, tensor(array, dtype)

    def upload(self, array: np.ndarray, dtype: str) -> Any:
        buffer, view = self.empty(array.shape, dtype)
        buffer[...] = array
        return view

    def download(self, buffer: np.ndarray) -> np.ndarray:
        return buffer

    def fill(self, buffer: np.ndarray, bits: int) -> None:
        """Set every byte."""
        buffer.view(np.uint8)[...] = bits

    def run(self, kernel: Call, arguments: Set) -> None:
        kernel(*arguments)

    def timer(self, kernel: Call, sets: Sequence[Set]) -> Callable[[], float]:
        """A function that gives the seconds of one call: the shortest mean over a round of the sets, so far as there is time.

        Another process only ever makes a round longer, so the shortest one is the least disturbed.
        """

        def measure() -> float:
            best, stop = float("inf"), time.perf_counter() + self.budget
            while True:
                start = time.perf_counter()
                for arguments in sets:
                    kernel(*arguments)
                now = time.perf_counter()
                best = min(best, (now - start) / len(sets))
                if now >= stop:
                    return best

        measure()  # threads awake, pages touched
        return measure

    def close(self) -> None:
        """Nothing is held outside the process."""


class CudaDevice:
    """A GPU. Calls are timed as one CUDA graph, so that the host's time to start them does not count."""

    rotated = 256 << 20
    budget = 2e-3

    def __init__(self, index: int = 0) -> None:
        self.cuda = Cuda(index)
        ffi = load_cuda_runtime()
        self._tensors = DeviceTensors(ffi, index)
        self._stream = ffi.use_raw_stream(ffi.device("cuda", index), self.cuda.stream)
        self._pinned = self.cuda.pinned(STAGED)
        self._staging: dict[int, np.ndarray] = {}
        self._filled: dict[tuple[int, int], int] = {}
        self._events = self.cuda.event(timing=True), self.cuda.event(timing=True)
        self.name = cuda_devices()[index].name

    def empty(self, shape: Sequence[int], dtype: str) -> tuple[Any, Any]:
        """(address, shape, dtype) and the tensor over it."""
        address = self.cuda.allocate(device_bytes(shape, dtype), zero=True)
        return (address, tuple(shape), dtype), self._tensors.tensor(address, shape, dtype)

    def upload(self, array: np.ndarray, dtype: str) -> Any:
        (address, _, _), view = self.empty(array.shape, dtype)
        self._send(address, array)
        return view

    def _send(self, address: int, array: np.ndarray) -> None:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, STAGED):
            piece = flat[start : start + STAGED]
            self._pinned[: piece.size] = piece
            self.cuda.copy_in(address + start, self._pinned[: piece.size])
            self.cuda.synchronize()

    def download(self, buffer: Any) -> np.ndarray:
        address, shape, dtype = buffer
        nbytes = device_bytes(shape, dtype)
        if nbytes not in self._staging:
            self._staging[nbytes] = self.cuda.pinned(nbytes)
        host = self._staging[nbytes]
        self.cuda.copy_out(host, address)
        self.cuda.synchronize()
        return host.view(storage_dtype(dtype)).reshape(shape).copy()

    def fill(self, buffer: Any, bits: int) -> None:
        """Set every byte, by a copy of a block that is filled once."""
        address, shape, dtype = buffer
        nbytes = device_bytes(shape, dtype)
        if (nbytes, bits) not in self._filled:
            self._filled[nbytes, bits] = self.cuda.allocate(nbytes)
            self._send(self._filled[nbytes, bits], np.full(nbytes, bits, np.uint8))
        self.cuda.copy(address, self._filled[nbytes, bits], nbytes)

    def timer(self, kernel: Call, sets: Sequence[Set]) -> Callable[[], float]:
        """A function that gives the seconds of one call: a graph of rounds over the sets, started once, by the device's clock."""

        def once() -> None:
            for arguments in sets:
                kernel(*arguments)

        def repeated() -> None:
            for _ in range(rounds):
                once()

        with self._stream:
            once()
            self.cuda.synchronize()
            start = time.perf_counter()
            once()
            self.cuda.synchronize()
            rounds = max(1, min(20, int(self.budget / (time.perf_counter() - start))))
            graph = self.cuda.capture(repeated)
        graph()
        self.cuda.synchronize()
        start_event, end_event = self._events

        def measure() -> float:
            self.cuda.record(start_event)
            graph()
            self.cuda.record(end_event)
            self.cuda.synchronize()
            return self.cuda.elapsed(start_event, end_event) / (rounds * len(sets))

        return measure

    def run(self, kernel: Call, arguments: Set) -> None:
        with self._stream:
            kernel(*arguments)
        self.cuda.synchronize()

    def close(self) -> None:
        self.cuda.close()


def open_device(kind: str) -> Any:
    """The device that kernels of targets of ``kind`` run on here. Raises LlmcError if there is none."""
    return CudaDevice() if kind == "cuda" else CpuDevice()


def device_name(kind: str) -> str:
    """The name of the device that :func:`open_device` opens, as records have it. Raises LlmcError if there is none."""
    if kind != "cuda":
        return this_host().cpu_name
    found = cuda_devices()
    if not found:
        raise LlmcError("models for CUDA are tuned on a GPU, and this machine has none that CUDA sees: run `llmc doctor`")
    return found[0].name
