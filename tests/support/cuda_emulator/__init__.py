"""Runs CUDA kernels on a CPU: tests of generated CUDA need neither a GPU nor nvcc. See :func:`run`."""

from tests.support.cuda_emulator.runner import library, run, source

__all__ = ["library", "run", "source"]
