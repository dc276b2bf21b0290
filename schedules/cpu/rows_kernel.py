"""A linear layer's kernel as a part of other kernels: rows of x times the weight that is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Expr = Any


@dataclass(frozen=True)
class RowsKernel:
    """``pieces`` of a weight's output rows are independent tasks. ``of(buffers)``, the parts and the bias of a weight by name,
    gives ``emit(piece, first, count)``: the piece's outputs of ``count`` rows of x from row ``first`` on.
    """

    pieces: int
    of: Callable[[dict[str, Expr]], Callable[[Expr, Expr, int], None]]
