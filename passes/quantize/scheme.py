"""Quantization schemes by name, and the canonical form of a quantized matrix.

======================================== ==========================================================================================
name                                     weight
======================================== ==========================================================================================
``int4_g64``, ``int8_g32``, ``int3_g32`` scale · (code - 2^(bits-1)), a scale for every 64, 32, ... columns of a row
``int4z_g64``                            scale · code + minimum
``int4p_g128``                           scale · (code - zero point)
``int8``, ``int4_row``, ``int4p_row``    the same with one scale for a whole row (an output channel); asked for by ``int8``, a CPU
                                         takes ``int8_g32``, by ``int8_row`` nothing else
``fp8_e4m3``                             scale · value(code), a scale per row; ``fp8_e4m3_t``: one for the matrix;
                                         ``fp8_e4m3_b128``: one per block of 128 × 128
``mxfp4``                                OCP MX: FP4 E2M1 with a power of two for 32 columns
``nf4_g64``                              the 16 quantiles of a normal distribution (QLoRA, arXiv:2305.14314) times a scale
``w8a8``, ``w8a8_fp8``                   ``int8`` and ``fp8_e4m3`` whose layers round their inputs to 8 bits as well, token by token
``q4_0`` ... ``q8_0``, ``iq4_nl``        GGUF's blocks of 32 columns
``q2_k`` ... ``q6_k``                    GGUF's blocks of 256 columns, scales (and minima) themselves quantized
======================================== ==========================================================================================

Scales are float16, except those of fp8 (float32) and mxfp4 (bfloat16); ``_f16``, ``_bf16`` or ``_f32`` behind a name says
otherwise. A name determines everything about a scheme. ``int4``, ``int3`` and ``int2`` are short for groups of 32, ``int4z`` and
the like too, ``nf4`` for groups of 64.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from llmc.errors import UsageError

SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Columns that may share a scale."""
E4M3_MAX = 448.0
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Scheme:
    """How a matrix [o, k] is stored; :func:`scheme` makes one from its name.

    ``kind``: what a code means: ``"int"``, ``"fp8_e4m3"``, ``"fp4_e2m1"`` or ``"table"``; ``bits`` of a code. ``group``: columns
    that share a scale, 0 for a whole row. ``offset``: ``"none"``, ``"zero_point"`` (an integer of ``bits`` bits per group) or
    ``"minimum"``. ``scale_dtype``: of scales and minima.

    ``rows``: rows that the rounding gives one common scale (0: all); scales are kept per row whatever it is. ``super_group``:
    columns whose scales share a float16 factor, the scales themselves being integers of ``sub_bits`` bits; 0: scales are floats.

    ``activations``: what the layer's inputs are rounded to, with a scale for each token, where the target has kernels for it:
    ``"int8"`` or ``"fp8_e4m3"``; empty: the target's own habit.
    """

    name: str
    kind: str
    bits: int
    group: int
    offset: str
    scale_dtype: str
    rows: int = 1
    super_group: int = 0
    sub_bits: int = 0
    activations: str = ""

    def groups(self, k: int) -> int:
        """Scales in a row of ``k`` columns."""
        return -(-k // self.group) if self.group else 1

    def bits_per_weight(self, k: int) -> float:
        """Bits of a weight in a row of ``k`` columns, with its share of scales and offsets."""
        offsets = {"none": 0, "zero_point": self.bits, "minimum": SCALE_BITS[self.scale_dtype]}[self.offset]
        if self.super_group:
            pairs = 2 if self.offset == "minimum" else 1
            return self.bits + pairs * (self.sub_bits / self.group + 16 / self.super_group)
        scales = SCALE_BITS[self.scale_dtype] / (self.rows or 1 << 30)
        return self.bits + (scales + offsets) * self.groups(k) / k

    def values(self) -> np.ndarray:
        """What each code stands for before scale and offset: float32 [2^bits]."""
        codes = np.arange(1 << self.bits)
        if self.kind == "int":
            return (codes - (1 << (self.bits - 1)) if self.offset == "none" else codes).astype(np.float32)
        if self.kind == "fp8_e4m3":
            return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        if self.kind == "fp4_e2m1":
            half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
            return np.concatenate([half, -half])
        return np.array(IQ4_NL if self.name.startswith("iq4_nl") else NF4, np.float32)

    def flat(self) -> Scheme:
        """The scheme with one level of float32 scales that holds the same values, for a scheme with two levels."""
        if not self.super_group:
            return self
        infix = {"none": "", "minimum": "z"}[self.offset]
        return scheme(f"int{self.bits}{infix}_g{self.group}_f32")


@dataclass
class QuantizedTensor:
    """A quantized matrix [o, k], unpacked: what rounding makes, importers read bit for bit, and layouts pack.

    ``codes``: uint8 [o, k] in 0 .. 2^bits - 1. ``scales``: [o, groups] in the scheme's scale dtype (bfloat16 as uint16 bits), int8
    for a scheme with two levels. ``zeros``: uint8 [o, groups]. ``minima``: like ``scales``. ``super_scales``, ``super_minima``:
    float16 [o, k / super_group]; a scale is super_scale · scale, a minimum - super_minimum · minimum.
    """

    scheme: Scheme
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    minima: np.ndarray | None = None
    super_scales: np.ndarray | None = None
    super_minima: np.ndarray | None = None

    def flat(self) -> QuantizedTensor:
        """The same values with one level of scales: exact, since a product of a float16 and 8 bits fits float32."""
        if self.super_scales is None:
            return self
        minima = None
        if self.minima is not None and self.super_minima is not None:
            minima = -self._product(self.super_minima, self.minima)
        return QuantizedTensor(self.scheme.flat(), self.codes, self._product(self.super_scales, self.scales), minima=minima)

    def _product(self, factors: np.ndarray, integers: np.ndarray) -> np.ndarray:
        repeat = self.scheme.super_group // self.scheme.group
        wide = np.repeat(factors.astype(np.float32), repeat, axis=1)[:, : integers.shape[1]]
        return np.asarray(wide * integers.astype(np.float32))

    def dequantize(self) -> np.ndarray:
        """The values, float32 [o, k]: one product and one sum in float32 each."""
        if self.super_scales is not None:
            return self.flat().dequantize()
        k = self.codes.shape[1]
        how, group = self.scheme, self.scheme.group or k
        values = how.values()[self.codes]
        if self.zeros is not None:
            values -= np.repeat(self.zeros.astype(np.float32), group, axis=1)[:, :k]
        values *= np.repeat(floats(self.scales, how.scale_dtype), group, axis=1)[:, :k]
        if self.minima is not None:
            values += np.repeat(floats(self.minima, how.scale_dtype), group, axis=1)[:, :k]
        return values

    def take(self, rows: np.ndarray | slice) -> QuantizedTensor:
        """The matrix of ``rows`` (indices or a slice): rows are quantized independently, so they may move."""
        kept: dict[str, Any] = {name: None if a is None else a[rows] for name, a in self._arrays().items()}
        return QuantizedTensor(self.scheme, **kept)

    def _arrays(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scheme"}


def concatenated(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Matrices of one scheme and width, one below the other."""
    if len(parts) == 1:
        return parts[0]
    columns = [p._arrays() for p in parts]
    joined: dict[str, Any] = {n: None if a is None else np.concatenate([c[n] for c in columns]) for n, a in columns[0].items()}
    return QuantizedTensor(parts[0].scheme, **joined)


def floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Scales as float32; bfloat16 may come as bits."""
    if dtype == "bfloat16" and stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Scales in their storage dtype; the inverse of :func:`floats`, rounded to nearest."""
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(dtype)


_GGUF = {
    s.name: s
    for s in (
        Scheme("q4_0", "int", 4, 32, "none", "float16"),
        Scheme("q4_1", "int", 4, 32, "minimum", "float16"),
        Scheme("q5_0", "int", 5, 32, "none", "float16"),
        Scheme("q5_1", "int", 5, 32, "minimum", "float16"),
        Scheme("q8_0", "int", 8, 32, "none", "float16"),
        Scheme("iq4_nl", "table", 4, 32, "none", "float16"),
        Scheme("q2_k", "int", 2, 16, "minimum", "float32", super_group=256, sub_bits=4),
        Scheme("q3_k", "int", 3, 16, "none", "float32", super_group=256, sub_bits=6),
        Scheme("q4_k", "int", 4, 32, "minimum", "float32", super_group=256, sub_bits=6),
        Scheme("q5_k", "int", 5, 32, "minimum", "float32", super_group=256, sub_bits=6),
        Scheme("q6_k", "int", 6, 16, "none", "float32", super_group=256, sub_bits=8),
    )
}
_SHORT = {"nf4": "nf4_g64", "int8_row": "int8", **{f"int{b}{o}": f"int{b}{o}_g32" for b in (2, 3, 4, 5, 6) for o in ("", "z", "p")}}
_PATTERN = re.compile(
    r"(?:int(?P<bits>[2-8])(?P<offset>[zp]?)|(?P<nf4>nf4))(?:_g(?P<group>\d+)|(?P<row>_row))?(?:_(?P<scale>f16|bf16|f32))?"
    r"|(?P<fp8>fp8_e4m3)(?:_(?P<span>t|b128))?"
    r"|(?P<mxfp4>mxfp4)|(?P<w8a8>w8a8(?:_fp8)?)"
)
_OFFSETS = {"": "none", "z": "minimum", "p": "zero_point"}
_DTYPES = {None: "float16", "f16": "float16", "bf16": "bfloat16", "f32": "float32"}
EXAMPLES = (
    "int4",
    "int4_g64",
    "int4_g128",
    "int4z_g32",
    "int8",
    "int8_g32",
    "int3_g32",
    "fp8_e4m3",
    "fp8_e4m3_b128",
    "mxfp4",
    "nf4",
    "w8a8",
    "w8a8_fp8",
)


@lru_cache(maxsize=256)
def scheme(name: str) -> Scheme:
    """The scheme that ``name`` means. Raises UsageError, with what there is, for a name that means none."""
    full = _SHORT.get(name, name)
    if full in _GGUF:
        return _GGUF[full]
    found = _PATTERN.fullmatch(full)
    if found is None:
        near = difflib.get_close_matches(name, [*EXAMPLES, *_GGUF], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"unknown quantization scheme {name!r}{hint}: there is {', '.join(EXAMPLES)} and the like")
    if found["fp8"]:
        group, rows = {None: (0, 1), "t": (0, 0), "b128": (128, 128)}[found["span"]]
        return Scheme(full, "fp8_e4m3", 8, group, "none", "float32", rows)
    if found["w8a8"]:
        whole = scheme("fp8_e4m3" if full.endswith("fp8") else "int8")
        return replace(whole, name=full, activations="fp8_e4m3" if full.endswith("fp8") else "int8")
    if found["mxfp4"]:
        return Scheme(full, "fp4_e2m1", 4, 32, "none", "bfloat16")
    group = int(found["group"] or 0)
    if not group and not found["row"] and full != "int8" and not (found["bits"] == "8"):
        raise UsageError(f"the scheme {name!r} does not say how many columns share a scale: use {full}_g32, or {full}_row for all")
    if found["group"] and group not in GROUPS:
        raise UsageError(
            f"the scheme {name!r} has groups of {group} columns: use one of {', '.join(map(str, GROUPS))}, or _row for a whole row"
        )
    kind, bits = ("table", 4) if found["nf4"] else ("int", int(found["bits"]))
    return Scheme(full, kind, bits, group, _OFFSETS[found["offset"] or ""], _DTYPES[found["scale"]])
