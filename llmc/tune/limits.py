"""What the machine can do at most: the roofline that kernels are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from llmc.targets.base import Target
from llmc.tune.task import Task

DENSE_FLOPS = {"sm_80": 312e12, "sm_86": 150e12, "sm_89": 165e12, "sm_90": 989e12, "sm_90a": 989e12, "sm_100a": 2250e12}
"""Multiply-adds of 16-bit numbers per second, times two, of the largest GPU of an architecture (NVIDIA's data sheets)."""


@dataclass(frozen=True)
class Limits:
    """Bytes per second from memory, floating-point operations per second."""

    bandwidth: float
    flops: float

    def seconds(self, task: Task, symbols: dict[str, int]) -> float:
        """The time of a perfect kernel for the task's call."""
        moved, flops = task.family.roofline(task.call, **symbols)
        return float(max(moved / self.bandwidth, flops / self.flops))


@cache
def measure(target: Target) -> Limits:
    """The limits of this machine for the target's kind, measured (the arithmetic of a GPU: looked up)."""
    if target.kind == "cuda":
        return Limits(_copy_bandwidth(), DENSE_FLOPS.get(target.mcpu, 1e15))
    from llmc.bench import read_bandwidth
    from llmc.runtime.host import default_threads

    a = np.ones((768, 768), np.float32)
    a @ a
    best = min(_seconds(lambda: a @ a) for _ in range(8))
    return Limits(read_bandwidth(default_threads()), 2 * 768**3 / best)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _copy_bandwidth() -> float:
    """Bytes read and written per second by a copy on the GPU."""
    from llmc.runtime.gpu.cudart import Cuda

    cuda, size = Cuda(0), 1 << 30
    try:
        source, target = cuda.allocate(size, zero=True), cuda.allocate(size, zero=True)

        def copy() -> None:
            cuda.copy(target, source, size)
            cuda.synchronize()

        copy()
        return 2 * size / min(_seconds(copy) for _ in range(5))
    finally:
        cuda.close()
