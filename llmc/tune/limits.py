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

INTEGER = {"vnni": 4.0, "sdot": 4.0, "smmla": 8.0, "bytes": 2.0}
"""Products of bytes in the time of one of float32, by :attr:`llmc.schedules.cpu.quantized_dot.Dot.how`: an instruction multiplies
four or, with i8mm, eight times as many numbers, and without any of these another one adds them up. 1 for other ways."""


@dataclass(frozen=True)
class Limits:
    """Bytes per second from memory, floating-point operations per second (of float32 on a CPU)."""

    bandwidth: float
    flops: float

    def seconds(self, task: Task, symbols: dict[str, int]) -> float:
        """The time of a perfect kernel for the task's call."""
        moved, flops = task.family.roofline(task.call, **symbols)
        return float(max(moved / self.bandwidth, flops / (self.flops * _integer_speed(task))))


def _integer_speed(task: Task) -> float:
    """Operations in the time of one of float32: more for the CPU's products of integers."""
    from llmc.schedules.cpu import layout_panel

    attrs = dict(task.call.attrs)
    if task.target.kind != "cpu" or attrs.get("layout") != layout_panel.NAME:
        return 1.0
    from llmc.passes.quantize.scheme import scheme
    from llmc.schedules.cpu.emit import Simd
    from llmc.schedules.cpu.quantized_dot import Dot

    return INTEGER.get(Dot(Simd(task.target), task.target, scheme(attrs["scheme"]).bits).how, 1.0)


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
