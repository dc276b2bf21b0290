"""Run a compiled module on an NVIDIA GPU: TVM's CUDA runtime starts the kernels, and the GPU chooses the tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact
from llmc.runtime.gpu.cudart import DL_CUDA, Cuda, DeviceTensors
from llmc.runtime.gpu.executor import GpuExecutor
from llmc.runtime.gpu.pipeline import CudaPipeline
from llmc.runtime.library import load_cuda_runtime
from llmc.runtime.vm import DL_CPU, load_vm, vm_function

FUNCTIONS = ("decode", "extend", "sample", "advance")


class CudaExecutor(GpuExecutor):
    """A :class:`GpuExecutor` over a module that llmc compiled for CUDA."""

    @classmethod
    def open_driver(cls, device: int) -> Cuda:
        """See :meth:`GpuExecutor.open_driver`."""
        return Cuda(device)

    def load_module(self, artifact: Artifact) -> tuple[DeviceTensors, dict[str, Callable[..., Any]]]:
        """See :meth:`GpuExecutor.load_module`."""
        device = self.driver.device
        ffi = load_cuda_runtime(artifact.folder, artifact.manifest.tvm)
        self._stream = ffi.use_raw_stream(ffi.device("cuda", device), self.driver.stream)
        vm = load_vm(ffi, artifact.folder / artifact.variant.library, (DL_CUDA, device), (DL_CPU, 0))
        return DeviceTensors(ffi, device), {name: vm_function(vm, name) for name in FUNCTIONS}

    def calling(self) -> AbstractContextManager[Any]:
        """See :meth:`GpuExecutor.calling`."""
        return self._stream

    def make_pipeline(self, m: Manifest) -> CudaPipeline:
        """See :meth:`GpuExecutor.make_pipeline`."""
        return CudaPipeline(self, m.limits.max_batch, m.model.vocab_size)
