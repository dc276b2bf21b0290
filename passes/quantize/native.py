"""Weights that a file already stores quantized: their scheme, and their codes bit for bit.

A source that can give its codes has ``quantized()``; joining sources of one scheme row by row keeps them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from llmc.importer.params import Concat, Source
from llmc.passes.quantize.scheme import QuantizedTensor, concatenated


@runtime_checkable
class QuantizedSource(Source, Protocol):
    """A source of quantized codes. ``quantization`` is the scheme's name, empty where the format has none here."""

    @property
    def quantization(self) -> str: ...

    def quantized(self) -> QuantizedTensor:
        """The stored matrix; only for a source whose ``quantization`` is not empty."""


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
