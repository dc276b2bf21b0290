"""Zero-copy tensors for compiled modules, of any dtype, over memory that NumPy or a file mapping holds.

NumPy has no bfloat16. Such a tensor is held as an array of same-sized integers, and only the dtype field of its DLPack
capsule says what the bits mean. The capsule is NumPy's own, so its deleter is NumPy's too: it drops the reference to the
array, takes the interpreter lock itself, and does nothing once the interpreter is gone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np

from llmc.runtime.library import import_ffi

ALIGNMENT = 64
"""Bytes that compiled kernels assume every tensor to be aligned to."""

# name -> (dtype that holds the bits in NumPy, DLPack type code, bits); codes from dlpack.h, DLDataTypeCode
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_DTYPES: dict[str, tuple[np.dtype, int, int]] = {
    "float64": (np.dtype(np.float64), _FLOAT, 64),
    "float32": (np.dtype(np.float32), _FLOAT, 32),
    "float16": (np.dtype(np.float16), _FLOAT, 16),
    "bfloat16": (np.dtype(np.uint16), _BFLOAT, 16),
    "float8_e4m3fn": (np.dtype(np.uint8), 10, 8),
    "float8_e5m2": (np.dtype(np.uint8), 12, 8),
    "int64": (np.dtype(np.int64), _INT, 64),
    "int32": (np.dtype(np.int32), _INT, 32),
    "int16": (np.dtype(np.int16), _INT, 16),
    "int8": (np.dtype(np.int8), _INT, 8),
    "uint64": (np.dtype(np.uint64), _UINT, 64),
    "uint32": (np.dtype(np.uint32), _UINT, 32),
    "uint16": (np.dtype(np.uint16), _UINT, 16),
    "uint8": (np.dtype(np.uint8), _UINT, 8),
    "bool": (np.dtype(np.bool_), _BOOL, 8),
}


class TensorHeader(ctypes.Structure):
    """The start of dlpack.h's DLManagedTensor, as far as the dtype."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def storage_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype whose elements hold the bits of ``dtype``: uint16 for bfloat16. Raises KeyError for an unknown name."""
    return _DTYPES[dtype][0]


def dtype_code(dtype: str) -> tuple[int, int]:
    """DLPack's type code and the bits of an element of ``dtype``. Raises KeyError for an unknown name."""
    return _DTYPES[dtype][1:]


def tensor(array: np.ndarray, dtype: str) -> Any:
    """A ``tvm_ffi.Tensor`` of ``dtype`` over the memory of ``array``, which stays alive as long as the tensor does.

    ``array`` must be C-contiguous, writable (DLPack has no read-only flag here) and of ``storage_dtype(dtype)``.
    Raises ValueError if it is not, or if its memory is not aligned to 64 bytes.
    """
    storage, code, bits = _DTYPES[dtype]
    if array.dtype != storage or not array.flags.c_contiguous:
        raise ValueError(f"a {dtype} tensor needs a contiguous {storage} array, not {array.dtype} with strides {array.strides}")
    if array.ctypes.data % ALIGNMENT and array.size:
        raise ValueError(f"a tensor's memory must be aligned to {ALIGNMENT} bytes, and this array's is not")
    capsule = array.__dlpack__()
    header = TensorHeader.from_address(_capsule_pointer(capsule, b"dltensor"))
    header.code, header.bits = code, bits
    return import_ffi().from_dlpack(capsule)


def zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A zero-filled array of ``storage_dtype(dtype)``, aligned to a memory page, committed by the OS as it is touched.

    It is an anonymous mapping rather than ``np.zeros``: NumPy asks for huge pages, so that touching the first KV page of
    each of 32 layers would commit 64 MB.
    """
    storage = storage_dtype(dtype)
    nbytes = prod(shape) * storage.itemsize
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), storage, count=prod(shape)).reshape(shape)
