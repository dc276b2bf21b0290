"""HIP, AMD's runtime, through ctypes: CUDA's functions under names of its own, and code objects that llmc loads itself."""

from __future__ import annotations

import ctypes
from types import MappingProxyType

from llmc.errors import ArtifactError, InternalError, MissingExtraError
from llmc.runtime.gpu.cudart import Cuda
from llmc.runtime.gpu.device_code import DeviceCode, KernelInfo
from llmc.runtime.gpu.launch import Launch, LaunchExecutor

DL_ROCM = 10
LIBRARIES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")


class Hip(Cuda):
    """HIP's :class:`~llmc.runtime.gpu.launch.LaunchDriver`."""

    prefix = "hip"
    renamed = MappingProxyType({"HostAlloc": "HostMalloc", "FreeHost": "HostFree", "GraphInstantiate": "GraphInstantiateWithFlags"})
    tool = "rocm-smi"
    forms = ("hsaco",)

    def open_library(self) -> ctypes.CDLL:
        """Raises MissingExtraError without libamdhip64."""
        for name in LIBRARIES:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise MissingExtraError(
            f"running on an AMD GPU needs {LIBRARIES[-1]}, and it is not installed here: install ROCm's package hip-runtime-amd"
        )

    def load_code(self, code: DeviceCode) -> dict[str, Launch]:
        """See :meth:`LaunchDriver.load_code`."""
        self.use()
        module, self._image = ctypes.c_void_p(), ctypes.create_string_buffer(code.code, len(code.code))
        try:
            self._call("ModuleLoadData", ctypes.byref(module), self._image)
        except InternalError as error:
            raise ArtifactError(
                f"the GPU {self.device} does not take the model's code object ({error}): compile for its architecture, which "
                "rocminfo names"
            ) from error
        return {info.name: self._kernel(module, info) for info in code.kernels}

    def _kernel(self, module: ctypes.c_void_p, info: KernelInfo) -> Launch:
        function = ctypes.c_void_p()
        self._call("ModuleGetFunction", ctypes.byref(function), module, info.name.encode())
        count = len(info.types)
        slots = (ctypes.c_uint64 * max(count, 1))()
        places = (ctypes.c_void_p * max(count, 1))(*(ctypes.addressof(slots) + 8 * i for i in range(count)))
        stream = ctypes.c_void_p(self.stream)

        def launch(values: list[int], grid: list[int], block: list[int], shared: int) -> None:
            slots[:count] = values  # type: ignore[assignment]  # ctypes takes numbers
            self._call("ModuleLaunchKernel", function, *grid, *block, shared, stream, places, None)

        return launch


class HipExecutor(LaunchExecutor):
    """A :class:`LaunchExecutor` over a module that llmc compiled for AMD GPUs."""

    module_kind = "hip"
    device_type = DL_ROCM

    @classmethod
    def open_driver(cls, device: int) -> Hip:
        """See :meth:`GpuExecutor.open_driver`."""
        return Hip(device)
