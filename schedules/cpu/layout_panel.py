"""How quantized matrices lie in memory for CPUs: panels of 16 rows, each one sequential stream.

SIMD lanes are weight *rows*, so a dot product needs no horizontal sum: a vector instruction multiplies four consecutive
codes of k (a *quad*) of every row with the same four activations. A panel is 16 rows because that is what a 512-bit register
holds; 256-bit and 128-bit machines take a panel in two or four vectors. So all processors share one layout, and one artifact.

A panel is a sequence of records, one for every group of k that shares a scale::

    record = block | block | ... | scales [16] | zeros [16] uint8 or minima [16] (if the scheme has them)
    block  = 32 columns of k: for 4 bits 256 bytes, for b bits 64 · b

A block stores its codes in bit planes, widest first: 5 bits are a plane of 4 and one of 1, 8 bits a single plane. A plane of
w bits is w vectors of 64 bytes; byte 4 r + j of vector v holds, for row r, columns 4 q + j of the 8 / w quads q = v · 8 / w + f,
the quad of field f in the bits from f · w on. A processor unpacks a plane with shifts and masks alone.

Rows are padded to 16 (codes and scales 0), columns to whole groups, a group for a whole row to 32. A group of 16 has two
records of scales behind every block. A scheme with two levels of scales has integers in place of scales and offsets, and their
factors behind the last record (:mod:`.two_level`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.passes.quantize.scheme import QuantizedTensor, Scheme
from llmc.schedules.cpu import two_level
from llmc.schedules.protocol import TensorSpec

NAME = "cpu.panel16"
ACTIVATIONS: tuple[str, ...] = ("int8",)
ROWS = 16
BLOCK = 32
QUADS = BLOCK // 4
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code -> widths of its planes, from its low bits up; every width divides a byte."""


@dataclass(frozen=True)
class Panels:
    """Where everything is, in bytes, for a [o, k] matrix of a scheme.

    ``record``: columns of a record, ``records`` of them in a panel; ``sets``: groups in a record; ``scale_bytes`` of one scale;
    ``offset_bytes`` of one zero or minimum, 0 without. With two levels of scales: ``field_bytes`` of a record's integers,
    ``super_records`` that share factors, ``super_bytes`` of those factors.
    """

    o: int
    k: int
    bits: int
    record: int
    sets: int
    scale_dtype: str
    offset_bytes: int
    field_bytes: int = 0
    super_records: int = 0
    super_bytes: int = 0

    @property
    def panels(self) -> int:
        return -(-self.o // ROWS)

    @property
    def records(self) -> int:
        return -(-self.k // self.record)

    @property
    def columns(self) -> int:
        """k with its padding."""
        return self.records * self.record

    @property
    def blocks(self) -> int:
        """Blocks in a record."""
        return self.record // BLOCK

    @property
    def block_bytes(self) -> int:
        return self.bits * ROWS * BLOCK // 8

    @property
    def scale_bytes(self) -> int:
        return np.dtype(STORED[self.scale_dtype]).itemsize

    @property
    def scales_at(self) -> int:
        """Of the first set's scales in a record; the other sets' follow, then the offsets of all sets."""
        return self.blocks * self.block_bytes

    @property
    def offsets_at(self) -> int:
        return self.scales_at + self.sets * ROWS * self.scale_bytes

    @property
    def record_bytes(self) -> int:
        if self.field_bytes:
            return self.scales_at + self.field_bytes
        return self.offsets_at + self.sets * ROWS * self.offset_bytes

    @property
    def supers(self) -> int:
        """Stretches of columns with factors of their own."""
        return -(-self.records // self.super_records) if self.super_records else 0

    @property
    def supers_at(self) -> int:
        """Of the factors in a panel."""
        return self.records * self.record_bytes

    @property
    def panel_bytes(self) -> int:
        return self.supers_at + self.supers * self.super_bytes


STORED = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


def geometry(scheme: Scheme, o: int, k: int) -> Panels:
    """The panels of a [o, k] matrix. The scheme must be one that :func:`takes` accepts."""
    group = scheme.group or -(-k // BLOCK) * BLOCK
    scale_bytes = np.dtype(STORED[scheme.scale_dtype]).itemsize
    offset = {"none": 0, "zero_point": 1, "minimum": scale_bytes}[scheme.offset]
    if scheme.super_group:
        kinds = 2 if scheme.offset == "minimum" else 1
        return Panels(
            o, k, scheme.bits, BLOCK, BLOCK // group, "float16", 0,
            two_level.BYTES[scheme.sub_bits], scheme.super_group // BLOCK, kinds * two_level.SUPER_BYTES,
        )  # fmt: skip
    return Panels(o, k, scheme.bits, max(group, BLOCK), max(1, BLOCK // group), scheme.scale_dtype, offset)


def takes(scheme: Scheme, o: int, k: int, target: Any) -> str | None:
    if target.kind != "cpu":
        return f"{NAME} is a layout for CPUs, not for {target.name}"
    if scheme.kind != "int" or scheme.bits not in PLANES:
        return f"{NAME} stores integer codes of {', '.join(map(str, PLANES))} bits, not {scheme.name}"
    group = scheme.group
    if group and group != BLOCK // 2 and group % BLOCK:
        return f"{NAME} takes groups of {BLOCK // 2} or a multiple of {BLOCK} columns, {scheme.name} has groups of {group}"
    return None


def parts(scheme: Scheme, o: int, k: int) -> dict[str, TensorSpec]:
    """One part: ``panels`` uint8 [panels, bytes of a panel]."""
    at = geometry(scheme, o, k)
    return {"panels": TensorSpec((at.panels, at.panel_bytes), "uint8")}


def pack(q: QuantizedTensor) -> dict[str, np.ndarray]:
    """Codes, scales and offsets into records; codes wider than the scheme's bits are a caller's error."""
    o, k = q.codes.shape
    at = geometry(q.scheme, o, k)
    whole = np.zeros((at.panels, at.panel_bytes), np.uint8)
    out = whole[:, : at.supers_at].reshape(at.panels, at.records, at.record_bytes)
    codes = np.zeros((at.panels * ROWS, at.columns), np.uint8)
    codes[:o, :k] = q.codes
    codes = codes.reshape(at.panels, ROWS, at.records, at.blocks, QUADS, 4).transpose(0, 2, 3, 4, 1, 5)
    planes, low = [], 0
    for width in PLANES[at.bits]:
        fields = ((codes >> low) & ((1 << width) - 1)).reshape(*codes.shape[:3], width, 8 // width, ROWS, 4)
        shifts = (np.arange(8 // width, dtype=np.uint8) * width)[:, None, None]
        planes.append(np.bitwise_or.reduce(fields << shifts, axis=-3).reshape(*codes.shape[:3], width * 64))
        low += width
    out[..., : at.scales_at] = np.concatenate(planes, axis=-1).reshape(at.panels, at.records, at.scales_at)
    if at.field_bytes:
        fields = _by_record(at, two_level.fields_of(q), at.sets * at.super_bytes // two_level.SUPER_BYTES)
        out[..., at.scales_at :] = two_level.pack_fields(q.scheme, fields)
        whole[:, at.supers_at :] = _supers(at, q)
        return {"panels": whole}
    out[..., at.scales_at : at.offsets_at] = _rows_last(at, q.scales)
    offsets = q.minima if q.scheme.offset == "minimum" else q.zeros
    if offsets is not None:
        out[..., at.offsets_at :] = _rows_last(at, offsets)
    return {"panels": whole}


def unpack(parts: dict[str, np.ndarray], scheme: Scheme, o: int, k: int) -> QuantizedTensor:
    """The inverse of :func:`pack`."""
    at = geometry(scheme, o, k)
    records = parts["panels"][:, : at.supers_at].reshape(at.panels, at.records, at.record_bytes)
    blocks = records[..., : at.scales_at].reshape(at.panels, at.records, at.blocks, at.block_bytes)
    codes = np.zeros((at.panels, at.records, at.blocks, QUADS, ROWS, 4), np.uint8)
    low = start = 0
    for width in PLANES[at.bits]:
        plane = blocks[..., start : start + 64 * width].reshape(*blocks.shape[:3], width, 1, ROWS, 4)
        shifts = (np.arange(8 // width, dtype=np.uint8) * width)[:, None, None]
        codes |= (((plane >> shifts) & ((1 << width) - 1)) << low).reshape(codes.shape)
        low, start = low + width, start + 64 * width
    matrix = codes.transpose(0, 4, 1, 2, 3, 5).reshape(at.panels * ROWS, at.columns)[:o, :k]
    codes = np.ascontiguousarray(matrix)
    if at.field_bytes:
        return _unpack_two_level(at, scheme, codes, records[..., at.scales_at :], parts["panels"][:, at.supers_at :])
    scales = _rows_first(at, records[..., at.scales_at : at.offsets_at], STORED[at.scale_dtype])
    offsets = records[..., at.offsets_at :]
    return QuantizedTensor(
        scheme,
        codes,
        scales,
        _rows_first(at, offsets, np.uint8) if scheme.offset == "zero_point" else None,
        _rows_first(at, offsets, STORED[at.scale_dtype]) if scheme.offset == "minimum" else None,
    )


def _supers(at: Panels, q: QuantizedTensor) -> np.ndarray:
    """The factors as bytes [panels, supers · bytes of one]: 16 rows of scales, then of minima."""
    held = [v for v in (q.super_scales, q.super_minima) if v is not None]
    padded = np.zeros((at.panels * ROWS, at.supers, len(held)), np.float16)
    padded[: at.o] = np.stack(held, axis=2)
    ordered = padded.reshape(at.panels, ROWS, at.supers, len(held)).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(ordered).view(np.uint8).reshape(at.panels, -1)


def _unpack_two_level(at: Panels, scheme: Scheme, codes: np.ndarray, fields: np.ndarray, supers: np.ndarray) -> QuantizedTensor:
    kinds = at.super_bytes // two_level.SUPER_BYTES
    integers = two_level.unpack_fields(scheme, fields).reshape(at.panels, at.records, at.sets, kinds, ROWS)
    integers = integers.transpose(3, 0, 4, 1, 2).reshape(kinds, at.panels * ROWS, -1)[:, : at.o, : scheme.groups(at.k)]
    factors = np.ascontiguousarray(supers).view(np.float16).reshape(at.panels, at.supers, kinds, ROWS)
    factors = factors.transpose(2, 0, 3, 1).reshape(kinds, at.panels * ROWS, at.supers)[:, : at.o]
    found = QuantizedTensor(scheme, codes, np.ascontiguousarray(integers[0]), super_scales=np.ascontiguousarray(factors[0]))
    if kinds > 1:
        found.minima, found.super_minima = np.ascontiguousarray(integers[1]), np.ascontiguousarray(factors[1])
    return found


def _by_record(at: Panels, values: np.ndarray, columns: int) -> np.ndarray:
    """[o, columns of all records] -> [panels, records, columns of one, 16]."""
    padded = np.zeros((at.panels * ROWS, at.records * columns), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return np.ascontiguousarray(padded.reshape(at.panels, ROWS, at.records, columns).transpose(0, 2, 3, 1))


def _rows_last(at: Panels, values: np.ndarray) -> np.ndarray:
    """[o, groups] -> bytes [panels, records, sets · 16 · size]."""
    return _by_record(at, values, at.sets).view(np.uint8).reshape(at.panels, at.records, -1)


def _rows_first(at: Panels, values: np.ndarray, dtype: Any) -> np.ndarray:
    """The inverse of :func:`_rows_last`, without the padding."""
    groups = -(-at.k * at.sets // at.record)
    ordered = np.ascontiguousarray(values).view(dtype).reshape(at.panels, at.records, at.sets, ROWS)
    return np.ascontiguousarray(ordered.transpose(0, 3, 1, 2).reshape(at.panels * ROWS, -1)[: at.o, :groups])
