"""Runs CUDA kernels on a CPU: tests of generated CUDA need neither a GPU nor nvcc. See :class:`.runner.Launchable`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.targets.base import Target
from tests.support.cuda_emulator import runner
from tests.support.cuda_emulator.runner import library, source

__all__ = ["launchable", "library", "run", "source"]

on_gpu = False
"""Set by ``pytest --gpu``: kernels run on the GPU of this machine."""


def launchable(function: Any, target: Target) -> Callable[..., list[np.ndarray]]:
    """PrimFunc ``function``, built: called with an array for each of its arguments, it works on copies and returns all of them."""
    if not on_gpu:
        return runner.Launchable(function, target)
    from tests.support import cuda_device

    return cuda_device.launchable(function, target)


def run(function: Any, target: Target, *arrays: np.ndarray) -> list[np.ndarray]:
    """``arrays`` after ``function`` ran on copies of them."""
    return launchable(function, target)(*arrays)
