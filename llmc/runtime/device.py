"""The GPUs of this machine as their drivers describe them: NVIDIA's through ``libcuda``, AMD's by the kernel, others by OpenCL."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# CUdevice_attribute in cuda.h
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16
# cl.h
_CL_GPU, _CL_ALL = 1 << 2, 0xFFFFFFFF
_CL_TYPE, _CL_NAME, _CL_MEMORY, _CL_SVM, _CL_COARSE = 0x1000, 0x102B, 0x101F, 0x1053, 1
_MOST = 64

OPENCL_LIBRARY = "libOpenCL.so.1"
TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where the kernel's driver for AMD GPUs lists them."""


ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103", "sm_120", "sm_120a")
"""Of NVIDIA GPUs: those that llmc compiles for, the older ones first."""


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: its index, its name, its compute capability ``(9, 0)``, its multiprocessors and its memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    kind = "cuda"

    @property
    def arch(self) -> str:
        """Its own architecture. Hopper's own instructions (wgmma) need the ``a``, which ties code to it."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if self.capability == (9, 0) else "")

    @property
    def compiled_for(self) -> str | None:
        """The architecture to compile for: its own if llmc knows it, else the newest before it, whose machine code or PTX it runs;
        None for a GPU that is older than all of them."""
        if self.arch in ARCHITECTURES:
            return self.arch
        older = [arch for arch in ARCHITECTURES if runs_on(arch, self.capability) or runs_from_ptx(arch, self.capability)]
        return older[-1] if older else None


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


PTX = "ptx"
"""The feature of a CUDA variant that holds PTX besides machine code."""


def runs_from_ptx(arch: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU's driver can translate PTX for ``arch``: the same compute capability and newer ones; with an ``a`` never."""
    number = arch.removeprefix("sm_")
    return number.isdigit() and capability >= (int(number[:-1]), int(number[-1]))


@dataclass(frozen=True)
class AmdDevice:
    """A GPU: its place among those of the machine, and its architecture (``"gfx942"``)."""

    index: int
    arch: str
    kind = "rocm"

    @property
    def name(self) -> str:
        return f"AMD GPU {self.index}"


def amd_devices() -> list[AmdDevice]:
    """The GPUs that the kernel's driver (amdkfd) lists; empty without it. Processors are nodes of version 0 there."""
    found: list[AmdDevice] = []
    for node in sorted(TOPOLOGY.glob("*/properties"), key=lambda path: int(path.parent.name)):
        try:
            fields = dict(line.split(None, 1) for line in node.read_text(encoding="ascii").splitlines() if " " in line)
        except OSError:
            continue  # a node that this user may not see
        version = int(fields.get("gfx_target_version", 0))
        if version:
            # 90402 is 9.4.2: two decimal digits each, written in hexadecimal in the architecture's name
            major, minor, step = version // 10000, version // 100 % 100, version % 100
            found.append(AmdDevice(len(found), f"gfx{major}{minor:x}{step:x}"))
    return found


@dataclass(frozen=True)
class MetalDevice:
    """The GPU of a Mac with an Apple processor, by that one's name (``"Apple M2 Pro"``)."""

    name: str
    kind = "metal"

    @property
    def arch(self) -> str:
        """Its family: M1 is ``apple7``, M2 ``apple8``, and every one since ``apple9`` (Apple, "Metal feature set tables")."""
        generation = re.search(r"\bM(\d+)", self.name)
        return f"apple{min(6 + int(generation[1]), 9)}" if generation else "apple7"


def metal_devices() -> list[MetalDevice]:
    """The GPU of this machine if it is such a Mac, as the kernel names its processor."""
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return []
    libc, name, size = ctypes.CDLL(None), ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    libc.sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, ctypes.c_size_t(0))
    return [MetalDevice(name.value.decode(errors="replace") or "Apple GPU")]


@dataclass(frozen=True)
class OpenClDevice:
    """A device: its handle, its name, whether it is a GPU or a processor, its memory in bytes."""

    handle: int
    name: str
    gpu: bool
    memory: int
    kind = "opencl"


def opencl_library() -> ctypes.CDLL | None:
    """OpenCL's loader with the types of what its functions return; None if it is not installed."""
    try:
        library = ctypes.CDLL(OPENCL_LIBRARY)
    except OSError:
        return None
    for name in ("clCreateContext", "clCreateCommandQueue", "clCreateProgramWithSource", "clCreateKernel", "clSVMAlloc"):
        getattr(library, name).restype = ctypes.c_void_p
    library.clSVMFree.restype = None
    return library


def opencl_devices() -> list[OpenClDevice]:
    """The devices that can run llmc's kernels, GPUs first; empty without an OpenCL."""
    library = opencl_library()
    if library is None:
        return []
    platforms, count = (ctypes.c_void_p * _MOST)(), ctypes.c_uint()
    if library.clGetPlatformIDs(_MOST, platforms, ctypes.byref(count)):
        return []
    found: list[OpenClDevice | None] = []
    for vendor in platforms[: count.value]:
        devices = (ctypes.c_void_p * _MOST)()
        if not library.clGetDeviceIDs(ctypes.c_void_p(vendor), ctypes.c_uint64(_CL_ALL), _MOST, devices, ctypes.byref(count)):
            found += [_describe_opencl(library, int(d or 0)) for d in devices[: count.value]]
    return sorted((d for d in found if d is not None), key=lambda d: not d.gpu)


def _describe_opencl(library: ctypes.CDLL, handle: int) -> OpenClDevice | None:
    def number(what: int) -> int:
        value = ctypes.c_uint64()
        library.clGetDeviceInfo(ctypes.c_void_p(handle), what, ctypes.c_size_t(8), ctypes.byref(value), None)
        return value.value

    name = ctypes.create_string_buffer(256)
    library.clGetDeviceInfo(ctypes.c_void_p(handle), _CL_NAME, ctypes.c_size_t(len(name)), name, None)
    if not number(_CL_SVM) & _CL_COARSE:
        return None
    return OpenClDevice(handle, name.value.decode(errors="replace"), bool(number(_CL_TYPE) & _CL_GPU), number(_CL_MEMORY))
