"""The parameter table: every weight of a graph by name, with its shape, its dtype and where its bytes are.

Nothing here holds weight data. A :class:`Source` says how to produce one tensor when it is asked to, so that a compile
streams the model one tensor at a time and its peak memory is one tensor, not the model. Transformations that the
compiler decides on (merging projections, transposing a Conv1D) are sources over sources: they run while streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


@runtime_checkable
class Source(Protocol):
    """Something that can produce one tensor.

    ``shape`` and ``dtype`` describe what :meth:`read` returns. ``scheme`` names the stored format: a plain dtype name, or a
    native block format such as ``"Q4_1"`` whose bytes :meth:`blocks` gives untouched.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def scheme(self) -> str: ...

    def read(self) -> np.ndarray:
        """The tensor, C-contiguous, of ``shape`` and ``DTYPES[dtype]``; native blocks come dequantized."""

    def describe(self) -> str:
        """Where the bytes come from, for error messages: ``model.safetensors:lm_head.weight``."""


@dataclass(frozen=True)
class Constant:
    """A small tensor known at compile time (rope's ``inv_freq``), held in memory."""

    value: np.ndarray
    origin: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.value.shape)

    @property
    def dtype(self) -> str:
        return str(self.value.dtype)

    @property
    def scheme(self) -> str:
        return self.dtype

    def read(self) -> np.ndarray:
        return np.asarray(self.value, order="C")

    def describe(self) -> str:
        return self.origin


@dataclass(frozen=True)
class Concat:
    """Several sources of equal dtype and trailing shape joined along axis 0: q, k and v as one ``[q+k+v, k]`` matrix."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def scheme(self) -> str:
        schemes = {p.scheme for p in self.parts}
        return schemes.pop() if len(schemes) == 1 else self.dtype

    def read(self) -> np.ndarray:
        out = np.empty(self.shape, DTYPES[self.dtype])
        row = 0
        for part in self.parts:
            out[row : row + part.shape[0]] = part.read()
            row += part.shape[0]
        return out

    def describe(self) -> str:
        return " + ".join(p.describe() for p in self.parts)


@dataclass(frozen=True)
class Mapped:
    """A source passed through a NumPy function: a transpose, a slice, a checkpoint's own weight conversion.

    ``function`` takes the arrays of ``inputs`` in order and returns one array of ``shape``; ``label`` names it in reports.
    """

    inputs: tuple[Source, ...]
    function: Callable[..., np.ndarray]
    shape: tuple[int, ...]
    dtype: str
    label: str

    @property
    def scheme(self) -> str:
        return self.dtype

    def read(self) -> np.ndarray:
        value = self.function(*[s.read() for s in self.inputs])
        return np.asarray(value, dtype=DTYPES[self.dtype], order="C")

    def describe(self) -> str:
        return f"{self.label}({', '.join(s.describe() for s in self.inputs)})"


class Derived:
    """What is computed from one other source: of its shape and dtype, as plain numbers, where a kind does not say otherwise."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def scheme(self) -> str:
        return self.dtype


@dataclass(frozen=True)
class Swapped(Derived):
    """A source with its last two axes exchanged: a Conv1D's ``[k, o]`` as ``[o, k]``, experts ``[E, k, o]`` as ``[E, o, k]``."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, rows, columns = self.source.shape
        return (*leading, columns, rows)

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(self.source.read(), -1, -2))

    def describe(self) -> str:
        return f"transpose({self.source.describe()})"


def transposed(source: Source) -> Source:
    """``source`` with its last two axes exchanged; what is exchanged already is taken back to how it is stored."""
    return source.source if isinstance(source, Swapped) else Swapped(source)


@dataclass
class Param:
    """One parameter of the graph: its name, its source, and the dtype it is stored in by the artifact.

    ``scheme`` names the quantization it is to be stored by, or is a part of; empty for plain numbers.
    """

    name: str
    source: Source
    dtype: str
    scheme: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class ParamTable:
    """Parameters by name, in a stable order. ``table[name]`` is a :class:`Param`; iteration is by name."""

    def __init__(self, params: Sequence[Param] = ()) -> None:
        self._params: dict[str, Param] = {p.name: p for p in params}

    def add(self, name: str, source: Source, dtype: str | None = None) -> Param:
        """Add a parameter; ``dtype`` defaults to the source's. Raises KeyError if the name is taken."""
        if name in self._params:
            raise KeyError(f"parameter {name!r} is already in the table")
        param = Param(name, source, dtype or source.dtype)
        self._params[name] = param
        return param

    def copy(self) -> ParamTable:
        """Another table with the same sources."""
        return ParamTable([replace(param) for param in self.values()])

    def remove(self, name: str) -> None:
        del self._params[name]

    def __getitem__(self, name: str) -> Param:
        return self._params[name]

    def __contains__(self, name: str) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def values(self) -> Iterator[Param]:
        return iter(self._params.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as the artifact will store them."""
        return sum(p.nbytes for p in self.values())
