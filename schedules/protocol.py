"""What a kernel family is: the contract between the compiler's passes and the kernels.

A family is a module in ``schedules/`` (``schedules/cpu/linear.py``) that exposes

- ``NAME``: unique, ``"cpu.linear"``;
- ``OP``: the dialect op it implements, ``"llmc.linear"``;
- ``SHAPES``: ``dict[str, KernelCall]``, labelled cases that tests **and** benchmarks use, odd ones among them;
- ``matches(call, target) -> str | None``: why it takes this call (one phrase for the report), or None if it does not;
- ``space(call, target) -> dict[str, list]``: the tunable axes and their values, the first of each the default;
- ``build(call, target, config) -> PrimFunc``: arguments in the order of the call's operands, then the result (none for
  an op that works in place, whose result is one of its operands; of several results, those that are no operands);
- ``reference(call, *arrays) -> np.ndarray``: the result in float64 NumPy;
- ``roofline(call, **symbols) -> (bytes, flops)``: what a perfect kernel must move and compute, symbols bound to numbers.

A family that picks among several kernels by its sizes when it is called also exposes what :mod:`~llmc.schedules.parts` says, so
that each of them is tuned and recorded alone.

A target lists its families in order; the first that matches takes the call, and the last one always matches its op.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an operand. A symbolic dimension is its name: ``("n", 576)``; equal names are equal dimensions."""

    shape: tuple[Dim, ...]
    dtype: str

    def bind(self, symbols: dict[str, int]) -> tuple[int, ...]:
        """The shape with numbers for names. Raises KeyError for a name that ``symbols`` lacks."""
        return tuple(d if isinstance(d, int) else symbols[d] for d in self.shape)


@dataclass(frozen=True)
class KernelCall:
    """One call of a dialect op as a kernel sees it: hashable, so equal calls share one kernel however many layers there are.

    ``attrs`` is sorted ``(name, value)`` pairs. ``phase`` is ``"decode"`` or ``"extend"``: a family may choose by it.
    """

    op: str
    args: tuple[TensorSpec, ...]
    result: TensorSpec
    attrs: tuple[tuple[str, Any], ...] = field(default=())
    phase: str = "extend"

    def attr(self, name: str, default: Any = None) -> Any:
        return dict(self.attrs).get(name, default)


class KernelFamily(Protocol):
    """The shape of a kernel family module (see the module docstring)."""

    NAME: str
    OP: str
    SHAPES: dict[str, KernelCall]

    def matches(self, call: KernelCall, target: Any) -> str | None: ...
    def space(self, call: KernelCall, target: Any) -> dict[str, list[Any]]: ...
    def build(self, call: KernelCall, target: Any, config: dict[str, Any]) -> Any: ...
    def reference(self, call: KernelCall, *arrays: np.ndarray) -> np.ndarray: ...
    def roofline(self, call: KernelCall, **symbols: int) -> tuple[int, int]: ...
