"""Sources whose native blocks survive a reordering: quantized blocks never span rows, so rows may move without requantizing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from llmc.importer.params import Source
from llmc.passes.quantize.scheme import QuantizedTensor


@runtime_checkable
class BlockSource(Source, Protocol):
    """A source stored in native blocks (``scheme`` names the block type)."""

    def blocks(self) -> np.ndarray:
        """The stored bytes, uint8 ``[*shape[:-1], bytes_per_row]``."""

    @property
    def quantization(self) -> str:
        """The name of the scheme that :meth:`quantized` gives, or an empty string."""

    def quantized(self) -> QuantizedTensor:
        """The matrix with its codes, bit for bit."""


@dataclass(frozen=True, eq=False)
class RowPermuted:
    """The rows (axis 0) of a block source in another order: ``out[i] = source[permutation[i]]``, in values and in blocks."""

    source: BlockSource
    permutation: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def scheme(self) -> str:
        return self.source.scheme

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(self.source.read()[self.permutation])

    def blocks(self) -> np.ndarray:
        return np.ascontiguousarray(self.source.blocks()[self.permutation])

    @property
    def quantization(self) -> str:
        return self.source.quantization

    def quantized(self) -> QuantizedTensor:
        return self.source.quantized().take(self.permutation)

    def describe(self) -> str:
        return f"rows_permuted({self.source.describe()})"


def row_permutation(function: Callable[[np.ndarray], np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray | None:
    """The permutation int64 ``[shape[0]]`` if ``function`` only reorders the rows of a tensor of ``shape``, else None.

    Found by running it on a thin tensor ``[rows, 2, ...]`` of distinct numbers. A function that needs the real row length
    (it raises, or returns None or another shape) is taken as not a row permutation.
    """
    thin = (shape[0], *[min(2, d) for d in shape[1:]])
    probe = np.arange(np.prod(thin), dtype=np.float64).reshape(thin)
    try:
        with np.errstate(all="ignore"):
            result = function(probe.copy())
    except (ValueError, IndexError, RuntimeError, KeyError):
        return None
    if result is None or result.shape != thin or not np.isfinite(result).all():
        return None
    order = (result.reshape(shape[0], -1)[:, 0] // max(1, probe[0].size)).astype(np.int64)
    if order.min(initial=0) < 0 or order.max(initial=0) >= shape[0] or not np.array_equal(probe[order], result):
        return None
    return order if np.array_equal(np.sort(order), np.arange(shape[0])) else None
