"""The parts of a quantized matrix as sources: quantized and packed when the first part is read, gone after the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np

from llmc.importer.finite import check_finite
from llmc.importer.params import Source
from llmc.passes.quantize.native import column_order, native, native_scheme
from llmc.passes.quantize.report import Stored
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.rounded import rounding
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, scheme
from llmc.schedules.layouts import WeightLayout, pack_stack
from llmc.schedules.protocol import TensorSpec

_CHUNK = 1 << 22  # weights compared in one go


@dataclass
class Matrix:
    """A matrix, or a stack of them [E, o, k], to be stored by ``scheme`` in ``layout``. ``record.error`` is set once it has been
    quantized.

    A source that holds codes of ``scheme`` (or of the two-level scheme that ``scheme`` is the flat form of) gives them
    as they are; any other is read and rounded.
    """

    source: Source
    scheme: Scheme
    layout: WeightLayout
    record: Stored
    _parts: dict[str, np.ndarray] = field(default_factory=dict)

    def part(self, name: str) -> np.ndarray:
        """One array of the layout. All are made at the first call, and each is dropped when it has been asked for."""
        if name not in self._parts:
            self._parts = self._packed()
        return self._parts.pop(name)

    def _packed(self) -> dict[str, np.ndarray]:
        shape = self.source.shape
        if len(shape) == 3:
            return pack_stack(self.layout, self.quantized(), shape[0])
        return dict(self.layout.pack(self.quantized()))

    @property
    def keeps_codes(self) -> bool:
        """Whether the source's codes are taken as they are."""
        held = native_scheme(self.source)
        return bool(held) and self.scheme in (scheme(held), scheme(held).flat())

    @property
    def column_order(self) -> np.ndarray | None:
        """The columns of W that the stored columns are, where they are not in order: x must be taken in this order."""
        return column_order(self.source) if self.keeps_codes else None

    def quantized(self) -> QuantizedTensor:
        """The matrix in its scheme, a stack's matrices one below the other. Raises ModelError for a NaN or an infinity."""
        if self.keeps_codes:
            self.record.error, _ = rounding(self.source)
            stored = native(self.source)
            return stored if stored.scheme == self.scheme else stored.flat()
        weight = self.source.read()
        check_finite(weight, self.source)
        weight = weight.reshape(-1, weight.shape[-1])
        rounded = quantize(weight, self.scheme)
        self.record.error = relative_error(weight, rounded)
        return rounded


@dataclass(frozen=True)
class Part:
    """One part of ``matrix``."""

    matrix: Matrix
    name: str
    spec: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.spec.shape)

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def scheme(self) -> str:
        return self.matrix.source.scheme

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(self.matrix.part(self.name))

    def describe(self) -> str:
        m = self.matrix
        return f"{self.name} of {m.scheme.name} in {m.layout.NAME}({m.source.describe()})"


def relative_error(weight: np.ndarray, rounded: Any) -> float:
    """‖rounded - weight‖ / ‖weight‖ in the Frobenius norm; 0 for a matrix of zeros."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    wrong = whole = 0.0
    for start in range(0, weight.shape[0], step):
        exact = weight[start : start + step].astype(np.float32)
        difference = rounded.take(slice(start, start + step)).dequantize() - exact
        wrong += float(np.vdot(difference, difference))
        whole += float(np.vdot(exact, exact))
    return sqrt(wrong / whole) if whole else 0.0
