"""NumPy arrays that TVM takes for tensors of a CUDA device, and tensor maps (TMA descriptors) as the emulator reads them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import tvm_ffi

CUDA = 2
ALIGNMENT = 256

_CODES = {"i": 0, "u": 1, "f": 2}
_BFLOAT16 = 4


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class DeviceArray:
    """An aligned copy of a NumPy array; ``tensor()`` shows it to TVM as CUDA memory. Must outlive that tensor."""

    def __init__(self, array: np.ndarray) -> None:
        raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.array = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self._shape = (ctypes.c_int64 * max(1, array.ndim))(*array.shape)
        self._strides = (ctypes.c_int64 * max(1, array.ndim))(*(s // array.itemsize for s in self.array.strides))
        code = _BFLOAT16 if array.dtype.name == "bfloat16" else _CODES[array.dtype.kind]
        self._managed = _DLManagedTensor(
            _DLTensor(self.array.ctypes.data, CUDA, 0, array.ndim, code, array.itemsize * 8, 1, self._shape, self._strides, 0),
            None,
            None,
        )

    def __dlpack__(self, **_: Any) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def tensor(self) -> Any:
        return tvm_ffi.from_dlpack(self)


class TensorMap(ctypes.Structure):
    """``CUtensorMap`` of ``emulator.h``: its 128 bytes are laid out for the emulator and not as the driver does it."""

    _pack_ = 1
    _fields_ = [
        ("base", ctypes.c_uint64), ("dim", ctypes.c_int32 * 5), ("stride", ctypes.c_int64 * 5), ("box", ctypes.c_int16 * 5),
        ("rank", ctypes.c_int8), ("element", ctypes.c_int8), ("swizzle", ctypes.c_int8), ("padding", ctypes.c_uint8 * 47),
    ]  # fmt: skip

    @staticmethod
    def encode(address: Any, dtype: Any, rank: int, base: Any, *values: Any) -> None:
        """The emulator's ``runtime.cuTensorMapEncodeTiled``: dims, strides in bytes (from the second), box, element strides,
        interleave, swizzle, L2 promotion, out-of-bounds fill.
        """
        numbers = [int(v) for v in values]
        dims, strides, box = numbers[:rank], numbers[rank : 2 * rank - 1], numbers[2 * rank - 1 : 3 * rank - 1]
        target = TensorMap.from_address(int(getattr(address, "value", address)))
        target.base = int(getattr(base, "value", base))
        target.dim[:rank], target.stride[: rank - 1], target.box[:rank] = dims, strides, box
        target.rank, target.element, target.swizzle = rank, tvm_ffi.dtype(str(dtype)).itemsize, numbers[4 * rank]
