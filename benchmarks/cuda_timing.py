"""What the benchmarks of CUDA kernels share: loading a library of kernels without the compiler, and timing calls in a graph.

Needs torch, tvm_ffi and TVM's runtime libraries on a machine with a GPU.
"""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(path: Path) -> Any:
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    import torch  # noqa: F401  (first: brings the CUDA runtime library that TVM's links to)

    # isort: split
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    return tvm.runtime.load_module(str(path))


def microseconds(calls: list[Callable[[], Any]], count: int = 48, repeats: int = 7) -> float:
    """Median time of one call among ``count`` in a CUDA graph, which go round ``calls``."""
    import torch
    import tvm_ffi

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with tvm_ffi.use_torch_stream(torch.cuda.stream(side)):
        graph.capture_begin(capture_error_mode="thread_local")
        for i in range(count):
            calls[i % len(calls)]()
        graph.capture_end()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    destination, times = torch.empty_like(source), []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        destination.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times)
