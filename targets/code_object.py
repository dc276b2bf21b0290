"""What an AMD code object (hsaco) says of itself: its architecture, and what each kernel takes.

An ELF file whose ``e_flags`` name the architecture and whose note ``NT_AMDGPU_METADATA`` is a MessagePack map ("User Guide for
AMDGPU Backend", LLVM: "Header", "Code Object V3 Metadata").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from llmc.errors import InternalError

EM_AMDGPU = 224
_SHT_NOTE, _NT_METADATA = 7, 32
_MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x41: "gfx1100", 0x4E: "gfx1201"}
_MACHINE_MASK = 0xFF


@dataclass(frozen=True)
class Kernel:
    """``lds`` and ``scratch`` in bytes (of a block, of a thread), ``vgprs`` of a thread, ``spills`` of registers to memory."""

    name: str
    wave: int
    threads: int
    lds: int
    scratch: int
    vgprs: int
    spills: int


@dataclass(frozen=True)
class CodeObject:
    """``arch``: ``"gfx942"``; ``target``: the target id, ``"amdgcn-amd-amdhsa-hcc-gfx942"`` (TVM names it so)."""

    arch: str
    target: str
    kernels: tuple[Kernel, ...]


def parse(code: bytes) -> CodeObject:
    """Raises InternalError for what is no 64-bit AMD GPU code object, or has no metadata."""
    if len(code) < 64 or code[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", code, 18)[0] != EM_AMDGPU:
        raise InternalError("a code object was expected, and this is no 64-bit ELF file for AMD GPUs")
    (sections,) = struct.unpack_from("<Q", code, 40)
    flags, _, _, _, size, count, _ = struct.unpack_from("<I6H", code, 48)
    arch = _MACHINES.get(flags & _MACHINE_MASK, f"machine {flags & _MACHINE_MASK:#x}")
    for index in range(count):
        _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", code, sections + index * size)
        if kind == _SHT_NOTE:
            metadata = _metadata(code[offset : offset + length])
            if metadata is not None:
                kernels = tuple(_kernel(entry) for entry in metadata.get("amdhsa.kernels", ()))
                return CodeObject(arch, str(metadata.get("amdhsa.target", "")), kernels)
    raise InternalError(f"a code object for {arch} has no metadata of its kernels")


def find(library: bytes) -> list[bytes]:
    """The code objects that lie as data in a shared library, each with what follows it."""
    found, at = [], library.find(b"\x7fELF", 1)
    while at >= 0:
        if at + 20 <= len(library) and struct.unpack_from("<H", library, at + 18)[0] == EM_AMDGPU:
            found.append(library[at:])
        at = library.find(b"\x7fELF", at + 4)
    return found


def _kernel(entry: dict[str, Any]) -> Kernel:
    return Kernel(
        name=str(entry[".name"]),
        wave=int(entry[".wavefront_size"]),
        threads=int(entry[".max_flat_workgroup_size"]),
        lds=int(entry[".group_segment_fixed_size"]),
        scratch=int(entry[".private_segment_fixed_size"]),
        vgprs=int(entry[".vgpr_count"]),
        spills=int(entry[".vgpr_spill_count"]) + int(entry[".sgpr_spill_count"]),
    )


def _metadata(notes: bytes) -> dict[str, Any] | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + (name_size + 3 & ~3)
        if kind == _NT_METADATA and notes[at + 12 : at + 18] == b"AMDGPU":
            return _unpack(notes[start : start + size], 0)[0]
        at = start + (size + 3 & ~3)
    return None


_SCALARS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_SIZED = {0xD9: (">B", "text"), 0xDA: (">H", "text"), 0xDB: (">I", "text"), 0xDC: (">H", "list"), 0xDD: (">I", "list"),
          0xDE: (">H", "map"), 0xDF: (">I", "map")}  # fmt: skip


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """The MessagePack value at a position, and where it ends; the kinds that LLVM writes."""
    tag, at = data[at], at + 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if tag in _SCALARS:
        return struct.unpack_from(_SCALARS[tag], data, at)[0], at + struct.calcsize(_SCALARS[tag])
    if tag < 0xC0:
        kind, count = ("map", tag & 0x0F) if tag < 0x90 else ("list", tag & 0x0F) if tag < 0xA0 else ("text", tag & 0x1F)
    elif tag in _SIZED:
        form, kind = _SIZED[tag]
        count, at = struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    else:
        raise InternalError(f"the metadata of a code object has a value of unknown kind {tag:#x}")
    if kind == "text":
        return data[at : at + count].decode(), at + count
    values = []
    for _ in range(count if kind == "list" else 2 * count):
        value, at = _unpack(data, at)
        values.append(value)
    return (values if kind == "list" else dict(zip(values[::2], values[1::2], strict=True))), at
