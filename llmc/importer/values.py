"""The values of a walk: tensors in stored shape, mask markers, and sizes that may be the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from tvm import relax

Size: TypeAlias = int | sympy.Expr

LENGTH = sympy.Symbol("n", integer=True, positive=True)
"""The number of tokens, in torch shapes."""

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int32",  # ids and positions: no model counts tokens beyond 2^31
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Tensor:
    """A value of the walk: its Relax expression, in stored shape, and the shape torch knows it by."""

    expr: relax.Expr
    shape: tuple[Size, ...]
    dtype: str
    param: relax.Var | None = None
    """For a parameter, the variable itself in its full shape."""

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class MaskMarker:
    """The value of a ``llmc::mask`` node: which positions a row may see."""

    window: int
    chunk: int
    problem: str


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def stored_shape(shape: Sequence[Size]) -> tuple[Size, ...]:
    """``shape`` without its leading unit dimensions (at least one dimension stays)."""
    lead = 0
    while lead < len(shape) - 1 and is_one(shape[lead]):
        lead += 1
    return tuple(shape[lead:])
