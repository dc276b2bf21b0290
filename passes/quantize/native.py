"""Weights that a file already stores quantized: their scheme, and their codes bit for bit.

A source that can give its codes has ``quantized()``; joining sources of one scheme row by row keeps them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from llmc.importer.params import Concat, Param, Source
from llmc.passes.quantize.scheme import QuantizedTensor, concatenated


@runtime_checkable
class QuantizedSource(Source, Protocol):
    """A source of quantized codes, a matrix [o, k] or a stack of them [E, o, k]. ``quantization`` is the scheme's name, empty where
    the format has none here.
    """

    @property
    def quantization(self) -> str: ...

    def quantized(self) -> QuantizedTensor:
        """The stored matrix [o, k], or [E · o, k]; only for a source whose ``quantization`` is not empty."""


def native_scheme(source: Source) -> str:
    """The scheme that ``source`` is stored by, or an empty string."""
    if isinstance(source, Concat):
        schemes = {native_scheme(part) for part in source.parts}
        return schemes.pop() if len(schemes) == 1 else ""
    return source.quantization if isinstance(source, QuantizedSource) else ""


def native(source: Source) -> QuantizedTensor:
    """The stored matrix of a source whose :func:`native_scheme` is not empty."""
    if isinstance(source, Concat):
        return concatenated([native(part) for part in source.parts])
    assert isinstance(source, QuantizedSource)
    return source.quantized()


def column_order(source: Source) -> np.ndarray | None:
    """The model's columns that the columns of :func:`native` are, int64 [k]; None if they are in order.

    GPTQ's act-order keeps groups of columns that are not neighbours; a layer over such codes takes x in the same order.
    """
    if isinstance(source, Concat):
        return column_order(source.parts[0])
    return getattr(source, "column_order", None)


def stored_order(param: Param) -> bytes:
    """What of ``param`` must be equal for its codes to be joined with another's: the order of its columns."""
    order = column_order(param.source) if param.scheme and param.scheme == native_scheme(param.source) else None
    return b"" if order is None else order.tobytes()
