"""Weights made of the rows of quantized ones: a row's codes never depend on another's, so rows may move without requantizing.

A checkpoint's conversions permute the rows of a projection, or stack the matrices of experts. Whether a conversion does no more
than that is found by running it on thin tensors of distinct numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from llmc.importer.params import Source
from llmc.passes.quantize.native import QuantizedSource, column_order, native_scheme
from llmc.passes.quantize.scheme import QuantizedTensor, concatenated


@dataclass(frozen=True, eq=False)
class Rows:
    """Row i of the result, counted over all axes but the last, is row ``order[i]`` of the ``parts``, one below the other."""

    parts: tuple[QuantizedSource, ...]
    order: np.ndarray
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def scheme(self) -> str:
        schemes = {part.scheme for part in self.parts}
        return schemes.pop() if len(schemes) == 1 else self.dtype

    @property
    def quantization(self) -> str:
        """The scheme of all parts; empty if they differ, or if their columns are stored in different orders."""
        names = {native_scheme(part) for part in self.parts}
        orders = {None if (found := column_order(part)) is None else found.tobytes() for part in self.parts}
        return names.pop() if len(names) == len(orders) == 1 else ""

    @property
    def column_order(self) -> np.ndarray | None:
        return column_order(self.parts[0])

    def quantized(self) -> QuantizedTensor:
        return concatenated([part.quantized() for part in self.parts]).take(self.order)

    def read(self) -> np.ndarray:
        rows = np.concatenate([part.read().reshape(-1, self.shape[-1]) for part in self.parts])
        return np.ascontiguousarray(rows[self.order].reshape(self.shape))

    def describe(self) -> str:
        return f"rows({' + '.join(part.describe() for part in self.parts)})"


def row_order(
    function: Callable[..., np.ndarray | None], inputs: Sequence[tuple[int, ...]], shape: tuple[int, ...]
) -> np.ndarray | None:
    """The rows of tensors of the shapes ``inputs`` that make up the result of ``function``, of ``shape``: int64 [rows]. None if
    it does anything else than to take rows.

    Found by running it on tensors whose rows are two distinct numbers long. A function that needs the real row length (it raises,
    or returns None or another shape) is taken as one that does more. Vectors are columns of rows of one number.
    """
    thin = [_thin(s) for s in inputs]
    ends = np.cumsum([prod(t) for t in thin])
    width = thin[0][-1] if len(inputs[0]) > 1 else 1
    probe = np.arange(ends[-1], dtype=np.float64)
    try:
        with np.errstate(all="ignore"):
            result = function(*[p.reshape(t) for p, t in zip(np.split(probe.copy(), ends[:-1]), thin, strict=True)])
    except (ValueError, IndexError, RuntimeError, KeyError):
        return None
    if result is None or result.shape != _thin(shape) or not np.isfinite(result).all() or prod(shape[-1:]) < width:
        return None
    found = np.asarray(result).reshape(-1, width)
    order = (found[:, 0] // width).astype(np.int64)
    rows = probe.reshape(-1, width)
    if order.min(initial=0) < 0 or order.max(initial=0) >= len(rows) or not np.array_equal(rows[order], found):
        return None
    return order


def _thin(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (*shape[:-1], min(2, shape[-1]))


def reordered(inputs: Sequence[Source], function: Callable[..., np.ndarray | None], shape: tuple[int, ...]) -> Source | None:
    """What ``function`` makes of ``inputs``, if that is but their rows in some order: the one source itself where it changes
    nothing, or :class:`Rows` of quantized ones. None if it does more, or if nothing is quantized that would be worth keeping.
    """
    quantized = tuple(s for s in inputs if isinstance(s, QuantizedSource) and native_scheme(s))
    if not shape or {s.shape[-1] for s in inputs} != {shape[-1]} or not (len(inputs) == 1 or len(quantized) == len(inputs)):
        return None
    order = row_order(function, [s.shape for s in inputs], shape)
    if order is None:
        return None
    if len(inputs) == 1 and inputs[0].shape == shape and np.array_equal(order, np.arange(len(order))):
        return inputs[0]
    return Rows(quantized, order, shape) if len(quantized) == len(inputs) else None
