"""A GPU for :class:`CudaExecutor` that is this machine: device memory is host memory, and the stream is a queue of work.

What is put into the stream is done as late as CUDA allows: when somebody waits for it. Copies read and write when they are done and
not when they are asked for, so that pinned memory which is used again too early, or read before its event, shows. The phases are
the hand-made module's own machine code; sampling is the NumPy reference.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.runtime.draws import FIELD, MOST
from llmc.runtime.gpu import cuda
from llmc.runtime.library import load_runtime
from llmc.runtime.tensors import storage_dtype, tensor
from llmc.runtime.vm import DL_CPU, load_vm, vm_function
from llmc.schedules.cuda import advance, sample

_ALIGNMENT = 256


class FakeCuda:
    """Stands for :class:`llmc.runtime.gpu.cudart.Cuda`."""

    total = 1 << 30
    graphs = True

    def __init__(self, device: int = 0) -> None:
        self.device, self.stream = device, 0
        self.copied: list[int] = []
        self.launched = 0
        self._queue: deque[Callable[[], None]] = deque()
        self._asked = self._done = 0
        self._events: dict[int, int] = {}
        self._recording: list[Callable[[], None]] | None = None
        self._memory: list[np.ndarray] = []
        self.used = 0
        self.closed = False

    def use(self) -> None:
        assert not self.closed

    def turn(self) -> AbstractContextManager[None]:
        self.use()
        return nullcontext()

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def pinned(self, nbytes: int) -> np.ndarray:
        raw = np.full(nbytes + _ALIGNMENT, 77, np.uint8)
        self._memory.append(raw)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + nbytes]

    def allocate(self, nbytes: int, zero: bool = False) -> int:
        block = self.pinned(max(nbytes, 1))
        self.used += nbytes
        if zero:
            self.clear(int(block.ctypes.data), nbytes)
        return int(block.ctypes.data)

    def clear(self, address: int, nbytes: int) -> None:
        self.enqueue(lambda: ctypes.memset(address, 0, nbytes) and None)

    def allocate_all(self, sizes: Sequence[int]) -> list[int]:
        return [self.allocate(size) for size in sizes]

    def free(self, address: int) -> None:
        """Address space is not short."""

    def enqueue(self, work: Callable[[], None]) -> None:
        if self._recording is not None:
            self._recording.append(work)
            return
        self._queue.append(work)
        self._asked += 1

    def _run_to(self, position: int) -> None:
        while self._done < position:
            self._queue.popleft()()
            self._done += 1

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self.enqueue(lambda: ctypes.memmove(target, source, nbytes))

    def copy_in(self, target: int, source: np.ndarray) -> None:
        self.copied.append(source.nbytes)
        self._copy(target, source.ctypes.data, source.nbytes)

    def copy_out(self, target: np.ndarray, source: int) -> None:
        self._copy(target.ctypes.data, source, target.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._copy(target, source, nbytes)

    def synchronize(self) -> None:
        self._run_to(self._asked)

    def event(self, timing: bool = False) -> int:
        self._events[len(self._events)] = 0
        return len(self._events) - 1

    def record(self, event: int) -> None:
        assert self._recording is None
        self._events[event] = self._asked

    def wait(self, event: int) -> None:
        self._run_to(self._events[event])

    def elapsed(self, start: int, end: int) -> float:
        """A microsecond for each piece of work."""
        return (self._events[end] - self._events[start]) * 1e-6

    def upload(self, pieces: Any) -> None:
        for piece in pieces:
            with piece.path.open("rb") as file:
                file.seek(piece.offset)
                ctypes.memmove(piece.address, file.read(piece.nbytes), piece.nbytes)

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        self._recording = []
        work()
        recorded, self._recording = self._recording, None

        def launch() -> None:
            self.launched += 1
            for item in recorded:
                self.enqueue(item)

        return launch

    def close(self) -> None:
        self.synchronize()
        self.closed = True


class _Tensors:
    """Stands for :class:`llmc.runtime.gpu.cudart.DeviceTensors`: (array, dtype)."""

    def __init__(self, ffi: Any, device: int) -> None:
        pass

    def tensor(self, address: int, shape: Any, dtype: str) -> tuple[np.ndarray, str]:
        storage = storage_dtype(dtype)
        count = int(np.prod(shape))
        raw = (ctypes.c_uint8 * (count * storage.itemsize)).from_address(address)
        return np.frombuffer(raw, storage, count).reshape(shape), dtype


def _sample(tokens: np.ndarray, logits: np.ndarray, draws: np.ndarray, positions: np.ndarray, counts: np.ndarray) -> None:
    tokens[:] = sample.reference(None, logits, draws, positions, counts)  # type: ignore[arg-type]
    for record, token in zip(draws, tokens, strict=True):
        slot = record[FIELD["slot"]]
        if slot >= 0 and token >= 0 and counts[slot, token] & MOST < MOST:
            counts[slot, token] += 1


def _advance(page_size: int) -> Callable[..., None]:
    def run(slots: np.ndarray, tokens: np.ndarray, ids: np.ndarray, at: np.ndarray, lens: np.ndarray, table: np.ndarray) -> None:
        slots[:] = advance.reference(advance._call(page_size), tokens, ids, at, lens, table)
        ids[:] = np.maximum(tokens, 0)
        at += 1
        lens += 1

    return run


def install(monkeypatch: pytest.MonkeyPatch, page_size: int) -> list[FakeCuda]:
    """Make :mod:`llmc.runtime.gpu.cuda` use such GPUs; those that were made, in order."""
    made: list[FakeCuda] = []

    def device(index: int) -> FakeCuda:
        made.append(FakeCuda(index))
        return made[-1]

    def function(vm: Any, name: str) -> Callable[..., None]:
        gpu = made[-1]
        if name in ("decode", "extend"):
            compiled = vm_function(vm, name)

            def forward(*arguments: Any) -> None:
                gpu.enqueue(lambda: compiled(*(tensor(a, dtype) for a, dtype in arguments)))

            return forward
        work = _sample if name == "sample" else _advance(page_size)
        return lambda *arguments: gpu.enqueue(lambda: work(*(a for a, _ in arguments)))

    def runtime(*_: Any) -> Any:
        return SimpleNamespace(use_raw_stream=lambda *_: nullcontext(), device=lambda *_: None)

    monkeypatch.setattr(cuda, "Cuda", device)
    monkeypatch.setattr(cuda, "DeviceTensors", _Tensors)
    monkeypatch.setattr(cuda, "load_cuda_runtime", runtime)
    monkeypatch.setattr(cuda, "load_vm", lambda ffi, path, *_: load_vm(load_runtime(path.parent), path, (DL_CPU, 0)))
    monkeypatch.setattr(cuda, "vm_function", function)
    return made
