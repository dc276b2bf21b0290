"""A matrix that a calibrated method has quantized: a source whose codes wait in a file until the artifact is written."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod, sqrt
from pathlib import Path

import numpy as np

from llmc.importer.params import DTYPES, Concat, Derived, Source
from llmc.passes.quantize.scheme import QuantizedTensor, floats, scheme, stored
from llmc.passes.quantize.smoothquant import NAME, Smoothed


@dataclass(frozen=True, eq=False)
class Rounded(Derived):
    """``source``, quantized to the scheme ``quantization`` by ``method`` into the file ``path``.

    ``error``: the relative rounding error as in :func:`~llmc.passes.quantize.packed.relative_error`. ``row_factors``: [o], what
    each row is multiplied by when it is read; None for ones. Rows keep their codes: factors go into scales and minima.
    """

    source: Source
    quantization: str
    method: str
    path: Path
    error: float
    row_factors: np.ndarray | None = None

    @property
    def scheme(self) -> str:
        return self.source.scheme

    def read(self) -> np.ndarray:
        return self.quantized().dequantize().astype(DTYPES[self.dtype])

    def quantized(self) -> QuantizedTensor:
        with np.load(self.path) as held:
            parts = {name: held[name] for name in held.files}
        how = scheme(self.quantization)
        if self.row_factors is not None:
            for name in {"scales", "minima"} & parts.keys():
                scaled = floats(parts[name], how.scale_dtype) * self.row_factors[:, None]
                parts[name] = stored(scaled, how.scale_dtype)
        return QuantizedTensor(how, **parts)

    def describe(self) -> str:
        return f"{self.method}({self.source.describe()})"


def save(path: Path, tensor: QuantizedTensor) -> None:
    """Write what :meth:`Rounded.quantized` reads."""
    arrays = {f.name: getattr(tensor, f.name) for f in fields(tensor) if f.name != "scheme"}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def rounding(source: Source) -> tuple[float, str]:
    """The relative error that the codes of ``source`` already hold, and the method that chose them or what is rounded; 0 for a
    file's own codes and for what is yet to be rounded."""
    if isinstance(source, Concat):
        parts = [(prod(p.shape), *rounding(p)) for p in source.parts]
        total = sum(size for size, _, _ in parts)
        return sqrt(sum(size * error**2 for size, error, _ in parts) / total), parts[0][2]
    if isinstance(source, Smoothed):
        return 0.0, NAME
    return (source.error, source.method) if isinstance(source, Rounded) else (0.0, "")
