"""Device code as TVM stores it in a compiled module: the code itself, and how the host half launches each kernel in it.

Layout (little-endian; a string or bytes is a u64 length and the bytes)::

    format  u64 count  count * (key  name  u64 n  n * DLDataType  u64 m  m * launch tag  u64 k  k * i32)  ...  code

The tags name what follows a kernel's own arguments in a launch: sizes of the grid, of a block, bytes of shared memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from llmc.errors import ArtifactError

POINTER, FLOAT = 3, 2
"""DLPack's type codes of an address and of a floating-point number."""

_GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
_BLOCK = ("threadIdx.x", "threadIdx.y", "threadIdx.z")
_SHARED = "tirx.use_dyn_shared_memory"


@dataclass(frozen=True)
class KernelInfo:
    """``types``: (DLPack code, bits) of each argument; ``tags``: what comes after them in a launch."""

    name: str
    types: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]

    def sizes(self, values: list[int]) -> tuple[list[int], list[int], int]:
        """Blocks of the grid and threads of a block along x, y, z, and bytes of dynamic shared memory, from the ``values`` of the
        tags."""
        given = dict(zip(self.tags, values, strict=True))
        return [given.get(t, 1) for t in _GRID], [given.get(t, 1) for t in _BLOCK], given.get(_SHARED, 0)


@dataclass(frozen=True)
class DeviceCode:
    """``form``: ``"cl"`` (OpenCL C) or ``"hsaco"``; ``code`` in it."""

    form: str
    kernels: tuple[KernelInfo, ...]
    code: bytes


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        return int(value)

    def take(self, nbytes: int) -> bytes:
        if nbytes > len(self.data) - self.at:
            raise struct.error("it ends too early")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def text(self) -> str:
        return self.take(self.number()).decode()


def parse(data: bytes) -> DeviceCode:
    """The device code in ``data``. Raises ArtifactError if it is damaged."""
    stream = _Stream(data)
    try:
        form = stream.text()
        kernels = [_kernel(stream) for _ in range(stream.number())]
        return DeviceCode(form, tuple(kernels), stream.take(stream.number()))
    except (struct.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"the device code of the compiled module is damaged ({error}): recompile the model") from error


def _kernel(stream: _Stream) -> KernelInfo:
    stream.text()  # the key, which is the name once more
    name = stream.text()
    types = [struct.unpack("<BBH", stream.take(4))[:2] for _ in range(stream.number())]
    tags = [stream.text() for _ in range(stream.number())]
    stream.take(4 * stream.number())
    return KernelInfo(name, tuple(types), tuple(tags))
