"""Keys and values as codes, in NumPy: the reference of the kernels, bit for bit but for codes next to a tie, which a machine that
rounds the product first may round the other way.

A group of elements x becomes codes c and bfloat16 parameters (:class:`llmc.kv_layout.KvScheme`); all arithmetic is float32, and a
code is rounded once, to nearest, ties to even:

- without a minimum: scale = up(max |x| · (1 / largest)), c = round(x · (1 / scale)), two's complement or e4m3;
- with one: minimum = down(min x), scale = up((max x - minimum) · (1 / largest)), c = round((x - minimum) · (1 / scale)).

``up`` and ``down`` round to bfloat16 away from zero or towards minus infinity, so no code needs clipping; the step is at most
1/128 wider than it had to be. A scale of zero makes codes of zero.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.kv_layout import KvScheme

TINY = 1e-30
"""Below it a scale is zero: its inverse would leave float32."""


def up(x: np.ndarray) -> np.ndarray:
    """Non-negative float32 to the next bfloat16 value that is not smaller, as float32."""
    return ((x.astype(np.float32).view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def down(x: np.ndarray) -> np.ndarray:
    """float32 to the next bfloat16 value that is not greater, as float32."""
    bits = x.astype(np.float32).view(np.uint32)
    away = bits + np.uint32(0xFFFF) * (bits >> np.uint32(31))
    return (away & np.uint32(0xFFFF0000)).view(np.float32)


def quantize(x: np.ndarray, scheme: KvScheme) -> tuple[np.ndarray, np.ndarray]:
    """``x [..., dim]`` as bytes: codes uint8 [..., code_bytes], and parameters uint8 [..., 2 * parameters]."""
    dim, groups = x.shape[-1], scheme.groups(x.shape[-1])
    x = x.astype(np.float32)
    padded = np.concatenate([x, np.repeat(x[..., -1:], groups * scheme.span(dim) - dim, axis=-1)], axis=-1)
    parts = padded.reshape(*x.shape[:-1], groups, scheme.span(dim))
    minimum = down(parts.min(axis=-1)) if scheme.minimum else np.zeros(parts.shape[:-1], np.float32)
    reach = parts.max(axis=-1) - minimum if scheme.minimum else np.abs(parts).max(axis=-1)
    scale = up(reach * np.float32(1.0 / scheme.largest))
    scale = np.where(scale < np.float32(TINY), np.float32(0), scale)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    shifted = (parts - minimum[..., None]).astype(np.float64) * inverse[..., None].astype(np.float64)
    codes = _encode(shifted, scheme).reshape(*x.shape[:-1], -1)[..., :dim]
    parameters = np.stack([scale, minimum] if scheme.minimum else [scale], axis=-2)
    stored = parameters.astype(ml_dtypes.bfloat16).reshape(*x.shape[:-1], -1)
    return _packed(codes, scheme.bits), np.ascontiguousarray(stored).view(np.uint8)


def dequantize(codes: np.ndarray, parameters: np.ndarray, dim: int, scheme: KvScheme) -> np.ndarray:
    """The inverse, exactly, as float64 ``[..., dim]``."""
    groups = scheme.groups(dim)
    values = _decode(_unpacked(codes, dim, scheme.bits), scheme)
    held = np.ascontiguousarray(parameters).view(ml_dtypes.bfloat16).astype(np.float64).reshape(*values.shape[:-1], -1, groups)
    each = np.repeat(held, scheme.span(dim), axis=-1)[..., :dim]
    result = values * each[..., 0, :]
    return result + each[..., 1, :] if scheme.minimum else result


def _encode(x: np.ndarray, scheme: KvScheme) -> np.ndarray:
    if scheme.kind == "fp8_e4m3":
        return x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.rint(x).astype(np.int64).astype(np.uint8)


def _decode(codes: np.ndarray, scheme: KvScheme) -> np.ndarray:
    if scheme.kind == "fp8_e4m3":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return codes.astype(np.float64) if scheme.minimum else codes.view(np.int8).astype(np.float64)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    even = codes[..., 0::2].copy()
    odd = codes[..., 1::2]
    even[..., : odd.shape[-1]] |= odd << 4
    return even


def _unpacked(packed: np.ndarray, dim: int, bits: int) -> np.ndarray:
    if bits == 8:
        return np.ascontiguousarray(packed)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :dim]
