"""NVIDIA GPUs as the driver describes them, asked through ``libcuda`` without any other library."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# CUdevice_attribute in cuda.h
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: its index, its name, its compute capability ``(9, 0)``, its multiprocessors and its memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int

    @property
    def arch(self) -> str:
        """The architecture to compile for. Hopper's own instructions (wgmma) need the ``a``, which ties code to it."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if self.capability == (9, 0) else "")


def cuda_devices() -> list[CudaDevice]:
    """The GPUs that the driver lets this process use; empty without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_describe(driver, index) for index in range(count.value)]


def _describe(driver: ctypes.CDLL, index: int) -> CudaDevice:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    text = name.value.decode(errors="replace")
    return CudaDevice(index, text, (attribute(_MAJOR), attribute(_MINOR)), attribute(_MULTIPROCESSORS), memory.value)


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` runs on a GPU: the same major version and no newer minor; ``sm_90a`` on 9.0 alone."""
    number = arch.removeprefix("sm_").rstrip("af")
    major, minor = int(number[:-1]), int(number[-1])
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor
