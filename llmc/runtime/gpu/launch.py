"""Run a compiled module on a device that TVM has no runtime library for: llmc starts the kernels itself.

The host half of a module calls its kernels, and the virtual machine its memory functions, by name, and looks for a name in the
modules that it imports before it looks anywhere else. TVM's own runtime would put a module there that drives the device. Here a
module of plain C functions takes that place (tvm-ffi's "system library", under a prefix of its own): the kernels, each of which
hands its arguments to the driver; ``vm.builtin.alloc_storage`` and ``alloc_tensor``, which take device memory from the driver; and
``__tvm_set_device``, which has nothing to do. So everything stays as it was compiled: dispatch, shape arithmetic, grid sizes. The
same module runs with TVM's own runtime for the device where there is one.

A launch costs some ten microseconds of Python: little beside a prefill, and nothing in a decode step that is replayed as a graph.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import ArtifactError, LlmcError
from llmc.runtime.artifact import Artifact
from llmc.runtime.gpu.cudart import DeviceTensors, Driver
from llmc.runtime.gpu.device_code import FLOAT, DeviceCode, KernelInfo, parse
from llmc.runtime.gpu.executor import GpuExecutor
from llmc.runtime.library import load_runtime
from llmc.runtime.vm import DL_CPU, load_vm, vm_function

FUNCTIONS = ("decode", "extend")
Launch = Callable[[list[int], list[int], list[int], int], None]
"""``launch(arguments, grid, block, shared bytes)``: arguments as the 64 bits that each has, a float32 in the low half."""

# TVMFFITypeIndex in tvm/ffi/c_api.h
_NONE, _INT, _SHAPE, _TENSOR = 0, 1, 69, 70
_OBJECT_HEADER = 24

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
_Free = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)

_prefixes = itertools.count()
_kept: list[Any] = []
"""Functions that the process may call as long as it lives: what is registered in tvm-ffi cannot be taken back."""


class LaunchDriver(Driver, Protocol):
    """A driver that also loads code and starts kernels."""

    @property
    def forms(self) -> Sequence[str]:
        """The forms of code that it takes."""

    def load_code(self, code: DeviceCode) -> dict[str, Launch]:
        """A function for each kernel, by name. Raises ArtifactError if the device does not take the code."""


class Workspace:
    """Device memory for intermediates. Work is in stream order, so what one call has used the next may take."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._blocks: dict[int, list[int]] = {}
        self._used: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """A call of a function begins: storages of the last one are free. The same calls get the same addresses."""
        self._used = dict.fromkeys(self._blocks, 0)

    def storage(self, nbytes: int) -> int:
        """Memory until the next call begins."""
        blocks = self._blocks.setdefault(nbytes, [])
        index = self._used.get(nbytes, 0)
        if index == len(blocks):
            blocks.append(self._driver.allocate(nbytes))
        self._used[nbytes] = index + 1
        return blocks[index]

    def allocate(self, nbytes: int) -> int:
        """Memory until :meth:`free`."""
        free = self._free.setdefault(nbytes, [])
        address = free.pop() if free else self._driver.allocate(nbytes)
        self._sizes[address] = nbytes
        return address

    def free(self, address: int) -> None:
        self._free[self._sizes[address]].append(address)


def _values(arguments: int, count: int) -> list[int]:
    """The value halves of ``count`` TVMFFIAny, as 64 bits each."""
    return (ctypes.c_uint64 * (2 * count)).from_address(arguments)[1::2]


def _give(result: int, kind: int, value: int) -> None:
    """Write a TVMFFIAny."""
    ctypes.c_uint64.from_address(result).value = kind
    ctypes.c_uint64.from_address(result + 8).value = value


def _shape(handle: int) -> list[int]:
    """The dimensions of a shape object: behind the header of every object, an address and a count."""
    data, count = (ctypes.c_uint64 * 2).from_address(handle + _OBJECT_HEADER)
    return list((ctypes.c_int64 * count).from_address(data))


class _Imported:
    """The module that a compiled module finds its kernels and memory functions in."""

    def __init__(self, ffi: Any, driver: LaunchDriver, tensors: DeviceTensors, workspace: Workspace) -> None:
        self._ffi, self._driver, self._tensors, self._workspace = ffi, driver, tensors, workspace
        self._library = ctypes.CDLL(str(ffi.libinfo.find_libtvm_ffi()))

    def load(self, data: Any) -> Any:
        """What tvm-ffi calls to make a module of stored bytes."""
        code = parse(bytes(data))
        if code.form not in self._driver.forms:
            raise ArtifactError(f"the module's device code is {code.form!r}, and this driver takes {', '.join(self._driver.forms)}")
        launches = self._driver.load_code(code)
        prefix = f"llmc{next(_prefixes)}_"
        functions: dict[str, Callable[[int, int, int], None]] = {
            "__tvm_set_device": lambda arguments, count, result: None,
            "vm.builtin.alloc_storage": self._alloc_storage,
            "vm.builtin.alloc_tensor": self._alloc_tensor,
            **{info.name: _launcher(info, launches[info.name]) for info in code.kernels},
        }
        for name, function in functions.items():
            callback = self._callback(function)
            _kept.append(callback)
            self._library.TVMFFIEnvModRegisterSystemLibSymbol(f"__tvm_ffi_{prefix}{name}".encode(), callback)
        return self._ffi.get_global_func("ffi.SystemLib")(prefix)

    def _callback(self, function: Callable[[int, int, int], None]) -> Any:
        def call(_: int, arguments: int, count: int, result: int) -> int:
            try:
                function(arguments, count, result)
            except Exception as error:  # nothing may cross into C
                self._library.TVMFFIErrorSetRaisedFromCStr(b"RuntimeError", str(error).encode())
                return -1
            return 0

        return _Callback(call)

    def _alloc_storage(self, arguments: int, count: int, result: int) -> None:
        """(machine, shape in bytes, device, dtype, scope) -> an address."""
        (nbytes,) = _shape(_values(arguments, 2)[1])
        _give(result, _INT, self._workspace.storage(nbytes))

    def _alloc_tensor(self, arguments: int, count: int, result: int) -> None:
        """(storage, offset, shape, dtype) -> a tensor."""
        address, offset, shape, dtype = _values(arguments, 4)
        managed = self._tensors.managed(address + offset, _shape(shape), dtype & 0xFF, dtype >> 8 & 0xFF)
        handle = ctypes.c_void_p()
        if self._library.TVMFFITensorFromDLPack(ctypes.c_void_p(managed), 1, 1, ctypes.byref(handle)):
            raise ArtifactError("an intermediate tensor cannot be made")
        _give(result, _TENSOR, int(handle.value or 0))

    def redirect_workspaces(self, path: Path) -> list[Any]:
        """Have the module at ``path``, which is loaded, take the workspaces of its host functions from the device, too."""
        library = ctypes.CDLL(str(path))
        try:
            take, give = (ctypes.c_void_p.in_dll(library, f"__TVMBackend{name}Workspace") for name in ("Alloc", "Free"))
        except ValueError:
            return []  # no function has any
        on_host, back = _Allocate(int(take.value or 0)), _Free(int(give.value or 0))

        def allocate(kind: int, index: int, nbytes: int, code: int, bits: int) -> int | None:
            if kind == DL_CPU:
                return int(on_host(kind, index, nbytes, code, bits))
            try:
                return self._workspace.allocate(nbytes)
            except LlmcError:
                return None  # the caller says that memory ran out

        def free(kind: int, index: int, address: int) -> int:
            if kind == DL_CPU:
                return int(back(kind, index, address))
            self._workspace.free(address)
            return 0

        callbacks = [_Allocate(allocate), _Free(free)]
        take.value, give.value = (ctypes.cast(c, ctypes.c_void_p).value for c in callbacks)
        return callbacks


def _launcher(info: KernelInfo, launch: Launch) -> Callable[[int, int, int], None]:
    own = len(info.types)
    floats = [i for i, (code, bits) in enumerate(info.types) if code == FLOAT and bits == 32]

    def call(arguments: int, count: int, result: int) -> None:
        values = _values(arguments, count)
        for i in floats:  # they come as double
            (value,) = struct.unpack("<d", struct.pack("<Q", values[i]))
            values[i] = struct.unpack("<I", struct.pack("<f", value))[0]
        grid, block, shared = info.sizes(values[own:])
        if all(grid):
            launch(values[:own], grid, block, shared)

    return call


class LaunchExecutor(GpuExecutor):
    """A :class:`GpuExecutor` whose kernels llmc starts through the driver's own library."""

    module_kind: str
    """What TVM calls the kind of module that the device code is stored as."""

    device_type: int
    """DLPack's number of the kind of device."""

    driver: LaunchDriver

    @classmethod
    @abstractmethod
    def open_driver(cls, device: int) -> LaunchDriver:
        """See :meth:`GpuExecutor.open_driver`."""

    def load_module(self, artifact: Artifact) -> tuple[DeviceTensors, dict[str, Callable[..., Any]]]:
        """See :meth:`GpuExecutor.load_module`."""
        ffi = load_runtime(artifact.folder, artifact.manifest.tvm)
        tensors = DeviceTensors(ffi, self.driver.device, self.device_type)
        self._workspace = Workspace(self.driver)
        imported = _Imported(ffi, self.driver, tensors, self._workspace)
        failed: list[LlmcError] = []

        def load(data: Any) -> Any:
            try:
                return imported.load(data)
            except LlmcError as error:
                failed.append(error)
                raise

        ffi.register_global_func(f"ffi.Module.load_from_bytes.{self.module_kind}", load, override=True)
        path = artifact.folder / artifact.variant.library
        try:
            vm = load_vm(ffi, path, (DL_CPU, 0))
        except ArtifactError:
            if failed:
                raise failed[0] from None
            raise
        self._callbacks = imported.redirect_workspaces(path)
        return tensors, {name: vm_function(vm, name) for name in FUNCTIONS}

    @contextmanager
    def calling(self) -> Iterator[None]:
        """See :meth:`GpuExecutor.calling`."""
        self._workspace.begin()
        yield


def argument_sizes(info: KernelInfo) -> Sequence[int]:
    """Bytes of each argument."""
    return [bits // 8 for _, bits in info.types]
