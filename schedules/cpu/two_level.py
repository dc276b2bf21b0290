"""Scales that are themselves quantized (GGUF's K-quants), as panels hold them: at the bits that the file gives them.

A group's scale is super_scale · integer, its minimum - super_minimum · integer. The integers of a record, one *field* of 16 rows
for each scale and each minimum of its groups, lie behind its codes; the float16 factors of 256 columns lie behind a panel's last
record.

========= ============================== =================================================================================
sub_bits  fields of a record             bytes
========= ============================== =================================================================================
8         scales of two groups           16 for each field, int8
6         scale and minimum of a group,  16: row r has the first field, and the low 2 bits of the second above it; then
          or scales of two groups + 32   8: the second's other 4 bits, row r in the low and row r + 8 in the high half
4         scale, minimum, scale, minimum 16 for each pair, the second in the high half
========= ============================== =================================================================================
"""

from __future__ import annotations

import numpy as np

from llmc.passes.quantize.scheme import QuantizedTensor, Scheme

ROWS = 16
BYTES = {8: 32, 6: 24, 4: 32}
"""sub_bits -> bytes of a record's fields."""
SIGN = 32
"""Added to the signed scales of 6 bits."""
SUPER_BYTES = 2 * ROWS


def offset(scheme: Scheme) -> int:
    """What was added to the integers of ``scheme``."""
    return SIGN if scheme.sub_bits == 6 and scheme.offset == "none" else 0


def kinds(scheme: Scheme) -> int:
    """Fields of a group."""
    return 2 if scheme.offset == "minimum" else 1


def pack_fields(scheme: Scheme, fields: np.ndarray) -> np.ndarray:
    """int8 [..., fields, 16] of a record -> uint8 [..., bytes]."""
    if scheme.sub_bits == 8:
        return fields.view(np.uint8).reshape(*fields.shape[:-2], -1)
    values = (fields + np.int8(offset(scheme))).view(np.uint8)
    first, second = values[..., 0::2, :], values[..., 1::2, :]
    if scheme.sub_bits == 4:
        return (first | second << 4).reshape(*fields.shape[:-2], -1)
    high = second >> 2
    halves = [first | (second & 3) << 6, high[..., :8] | high[..., 8:] << 4]
    return np.concatenate([h.reshape(*fields.shape[:-2], -1) for h in halves], axis=-1)


def unpack_fields(scheme: Scheme, packed: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pack_fields`."""
    if scheme.sub_bits == 8:
        return packed.reshape(*packed.shape[:-1], -1, ROWS).view(np.int8)
    if scheme.sub_bits == 4:
        pairs = packed.reshape(*packed.shape[:-1], -1, ROWS)
        return np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*packed.shape[:-1], -1, ROWS).view(np.int8)
    low, high = packed[..., :ROWS], packed[..., ROWS:]
    second = low >> 6 | np.concatenate([high & 15, high >> 4], axis=-1) << 2
    return np.stack([low & 63, second], axis=-2).view(np.int8) - np.int8(offset(scheme))


def fields_of(q: QuantizedTensor) -> np.ndarray:
    """The integers of a matrix as int8 [o, groups · fields of a group]."""
    if q.minima is None:
        return q.scales
    return np.stack([q.scales, q.minima], axis=2).reshape(len(q.scales), -1)
