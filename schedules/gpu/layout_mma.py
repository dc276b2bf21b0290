"""How quantized matrices lie in memory for GPUs: tiles of 16 rows in the order of the A fragments of NVIDIA's tensor cores.

Other GPUs take the same bytes, eight columns of a row at a time, so that the variants of an artifact share them.

A warp multiplies 16 rows by m16n8k16 (PTX ISA): lane 4 g + t (g < 8, t < 4) holds columns of rows g and g + 8. Sixteen bytes of
one lane, one load, are a whole *chunk* of columns, 64 codes of 4 bits or 32 of 8, and the 32 lanes' bytes are consecutive.

``codes`` int32 [tiles, chunks, 32, 4]: in lane 4 g + t of a chunk that starts at column c,

- 4 bits (schemes of 2 to 4): word 2 s + h holds columns c + 32 s + 8 t + e, e < 8, of row g + 8 h, column e in bits
  4 (e / 2 + 4 (e % 2)) and up: one mask takes two neighbouring columns out into the two halves of a register;
- 8 bits (5 to 8, and fp8): word 2 h + p holds columns c + 8 t + 4 p + e, e < 4, in bytes 0, 2, 1, 3 for the same reason.

So a lane always has 8 consecutive columns of a row, as it has 16 consecutive bytes of a row of 16-bit activations.

``scales`` and, where the scheme has them, ``zeros`` (uint8) or ``minima``: [tiles, blocks, 8, groups, 2] in the scheme's
dtypes, for rows g and g + 8 and the groups in a block of 128 columns; a group of more columns is repeated in every block of
them. A scheme with one scale to a row and nothing else has ``scales`` [16 tiles], to multiply the finished sums by.

Rows are padded to 16, columns to 128, with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.passes.quantize.scheme import QuantizedTensor, Scheme
from llmc.schedules.protocol import TensorSpec
from llmc.targets.base import GpuTarget

NAME = "gpu.mma"
ACTIVATIONS: tuple[str, ...] = ()
ROWS = 16
BLOCK = 128
LANES = 32
UNIT = 8
"""Consecutive columns of a row in a lane."""

FORMATS = {"int": range(2, 9), "fp8_e4m3": (8,)}
"""Kinds of codes -> their bits."""

SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
BYTE_PLACES = (0, 2, 1, 3)


@dataclass(frozen=True)
class Tiles:
    """The geometry of an [o, k] matrix of a scheme. ``bits``: of a stored code, 4 or 8; ``group``: columns to a stored scale,
    at most a block, 0 where a row has one scale.
    """

    o: int
    k: int
    bits: int
    group: int

    @property
    def tiles(self) -> int:
        return -(-self.o // ROWS)

    @property
    def blocks(self) -> int:
        return -(-self.k // BLOCK)

    @property
    def columns(self) -> int:
        """k with its padding."""
        return self.blocks * BLOCK

    @property
    def chunk(self) -> int:
        """Columns in 16 bytes of the four lanes that share a row."""
        return 256 // self.bits

    @property
    def chunks(self) -> int:
        return self.columns // self.chunk

    @property
    def groups(self) -> int:
        """In a block."""
        return BLOCK // self.group


def geometry(scheme: Scheme, o: int, k: int) -> Tiles:
    """Where everything is for a scheme that :func:`takes` accepts."""
    row_wise = scheme.group == 0 and scheme.offset == "none"
    return Tiles(o, k, 4 if scheme.bits <= 4 else 8, 0 if row_wise else min(scheme.group or BLOCK, BLOCK))


def takes(scheme: Scheme, o: int, k: int, target: Any) -> str | None:
    if not isinstance(target, GpuTarget):
        return f"{NAME} is a layout for GPUs, not for {target.name}"
    if scheme.bits not in FORMATS.get(scheme.kind, ()) or scheme.super_group:
        return f"{NAME} stores integers of 2 to 8 bits and fp8 e4m3 with one level of scales, not {scheme.name}"
    if scheme.group and scheme.group not in (32, 64) and scheme.group % BLOCK:
        return f"{NAME} takes groups of 32, 64 or a multiple of {BLOCK} columns, {scheme.name} has groups of {scheme.group}"
    return None


def parts(scheme: Scheme, o: int, k: int) -> dict[str, TensorSpec]:
    at = geometry(scheme, o, k)
    codes = {"codes": TensorSpec((at.tiles, at.chunks, LANES, 4), "int32")}
    if not at.group:
        return codes | {"scales": TensorSpec((at.tiles * ROWS,), scheme.scale_dtype)}
    shape = (at.tiles, at.blocks, 8, at.groups, 2)
    offset = {
        "none": {},
        "zero_point": {"zeros": TensorSpec(shape, "uint8")},
        "minimum": {"minima": TensorSpec(shape, scheme.scale_dtype)},
    }[scheme.offset]
    return codes | {"scales": TensorSpec(shape, scheme.scale_dtype)} | offset


def pack(q: QuantizedTensor) -> dict[str, np.ndarray]:
    """The arrays of :func:`parts`, scales and minima in the dtype they come in. The caller checked :func:`takes`."""
    at = geometry(q.scheme, *q.codes.shape)
    codes = np.zeros((at.tiles * ROWS, at.columns), np.uint8)
    codes[: at.o, : at.k] = q.codes
    arrays = {"codes": _pack_codes(at, codes)}
    if not at.group:
        scales = np.zeros(at.tiles * ROWS, q.scales.dtype)
        scales[: at.o] = q.scales[:, 0]
        return arrays | {"scales": scales}
    named = {"scales": q.scales, "zeros": q.zeros, "minima": q.minima}
    return arrays | {name: _pack_groups(at, q.scheme.group, a) for name, a in named.items() if a is not None}


def unpack(parts: dict[str, np.ndarray], scheme: Scheme, o: int, k: int) -> QuantizedTensor:
    """The inverse of :func:`pack`."""
    at = geometry(scheme, o, k)
    codes = np.ascontiguousarray(_unpack_codes(at, np.asarray(parts["codes"]))[:o, :k])
    if not at.group:
        return QuantizedTensor(scheme, codes, np.ascontiguousarray(parts["scales"][:o, None]), None, None)
    groups = {name: _unpack_groups(at, scheme.group, array) for name, array in parts.items() if name != "codes"}
    return QuantizedTensor(scheme, codes, groups["scales"], groups.get("zeros"), groups.get("minima"))


def _pack_codes(at: Tiles, codes: np.ndarray) -> np.ndarray:
    if at.bits == 4:
        v = codes.reshape(at.tiles, 2, 8, at.chunks, 2, 4, 4, 2).transpose(
            0, 3, 2, 5, 4, 1, 7, 6
        )  # tile chunk g t | s h | odd pair
        v = v.reshape(*v.shape[:6], 4, 2)  # eight nibbles in order, two to a byte
        packed = v[..., 0] | v[..., 1] << 4
    else:
        v = codes.reshape(at.tiles, 2, 8, at.chunks, 4, 2, 4).transpose(0, 3, 2, 4, 1, 5, 6)  # tile chunk g t | h p | e
        packed = v[..., np.argsort(BYTE_PLACES)]
    return np.ascontiguousarray(packed).view("<i4").reshape(at.tiles, at.chunks, LANES, 4).astype(np.int32, copy=False)


def _unpack_codes(at: Tiles, words: np.ndarray) -> np.ndarray:
    packed = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if at.bits == 4:
        v = np.stack([packed & 15, packed >> 4], -1).reshape(at.tiles, at.chunks, 8, 4, 2, 2, 2, 4)
        v = v.transpose(0, 5, 2, 1, 4, 3, 7, 6)
    else:
        v = packed.reshape(at.tiles, at.chunks, 8, 4, 2, 2, 4)[..., list(BYTE_PLACES)].transpose(0, 4, 2, 1, 3, 5, 6)
    return v.reshape(at.tiles * ROWS, at.columns)


def _pack_groups(at: Tiles, group: int, values: np.ndarray) -> np.ndarray:
    """[o, groups of the scheme] -> [tiles, blocks, 8, groups of a block, 2]."""
    repeated = np.repeat(values, (group or at.columns) // at.group, axis=1)[:, : at.blocks * at.groups]
    full = np.zeros((at.tiles * ROWS, at.blocks * at.groups), values.dtype)
    full[: at.o, : repeated.shape[1]] = repeated
    return np.ascontiguousarray(full.reshape(at.tiles, 2, 8, at.blocks, at.groups).transpose(0, 3, 2, 4, 1))


def _unpack_groups(at: Tiles, group: int, values: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_pack_groups`."""
    full = np.asarray(values).transpose(0, 4, 2, 1, 3).reshape(at.tiles * ROWS, at.blocks * at.groups)
    count = -(-at.k // group) if group else 1
    return np.ascontiguousarray(full[: at.o, :: (group or at.columns) // at.group][:, :count])
