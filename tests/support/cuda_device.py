"""Runs CUDA kernels on this machine's GPU: what the emulator's tests become under ``pytest --gpu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm

from llmc.targets import cuda
from llmc.targets.base import Target


def launchable(function: Any, target: Target) -> Callable[..., list[np.ndarray]]:
    """Build PrimFunc ``function`` as a compile does. Called with an array for each argument, it works on copies and returns all.

    A target of another kind than CUDA skips the test: the emulator lends it limits that this GPU does not have.
    """
    if target.kind != cuda.KIND:
        pytest.skip(f"{target.name} is no target of this GPU")
    name = str(function.attrs.get("global_symbol", "kernel"))  # tools show kernels by it
    module = cuda.build_kernels(tvm.IRModule({name: function.with_attr("global_symbol", name)}), target)
    device = tvm.cuda(0)

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = [tvm.runtime.empty(a.shape, str(a.dtype), device) for a in arrays]
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.copyfrom(np.asarray(array, order="C"))
        module[name](*tensors)
        device.sync()
        return [tensor.numpy() for tensor in tensors]

    return run
