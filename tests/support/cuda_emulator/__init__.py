"""Runs CUDA kernels on a CPU: tests of generated CUDA need neither a GPU nor nvcc. See :func:`run`."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.targets.base import Target
from tests.support.cuda_emulator import runner
from tests.support.cuda_emulator.runner import library, source

__all__ = ["library", "run", "source"]

on_gpu = False
"""Set by ``pytest --gpu``: :func:`run` takes the GPU of this machine."""


def run(function: Any, target: Target, *arrays: np.ndarray) -> list[np.ndarray]:
    """See :func:`.runner.run`."""
    if not on_gpu:
        return runner.run(function, target, *arrays)
    from tests.support import cuda_device

    return cuda_device.run(function, target, *arrays)
