"""What a weight layout is: how a target stores a quantized matrix. The contract between quantization and the kernels.

A layout is a module in ``schedules/`` (``schedules/cpu/layout_panel.py``) with the members of :class:`WeightLayout`. A target
lists its layouts in order of preference (``layouts(target)``), and the first that takes a matrix stores it: the kernels of
``llmc.quantized_linear`` and ``llmc.quantized_take`` then get its parts as operands, and its name as an attribute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, concatenated
from llmc.schedules.protocol import TensorSpec
from llmc.targets.base import Target


class WeightLayout(Protocol):
    """The shape of a layout module. ``NAME``: unique, ``"cpu.panel16"``; ``ACTIVATIONS``: what kernels of this layout can round
    their inputs to, token by token (``"int8"``, ``"fp8_e4m3"``)."""

    NAME: str
    ACTIVATIONS: tuple[str, ...]

    def takes(self, scheme: Scheme, o: int, k: int, target: Any) -> str | None:
        """None if it stores a [o, k] matrix of ``scheme``; else why it does not, one phrase for the report."""

    def parts(self, scheme: Scheme, o: int, k: int) -> dict[str, TensorSpec]:
        """The tensors it stores, by name, in the order of a kernel's operands. o and k may be padded inside."""

    def pack(self, q: QuantizedTensor) -> dict[str, np.ndarray]:
        """The arrays of :meth:`parts`."""

    def unpack(self, parts: dict[str, np.ndarray], scheme: Scheme, o: int, k: int) -> QuantizedTensor:
        """The exact inverse of :meth:`pack`."""


def stack_parts(layout: WeightLayout, scheme: Scheme, experts: int, o: int, k: int) -> dict[str, TensorSpec]:
    """The tensors of ``experts`` matrices [o, k]: :meth:`WeightLayout.parts` with the experts as first axis."""
    return {name: TensorSpec((experts, *spec.shape), spec.dtype) for name, spec in layout.parts(scheme, o, k).items()}


def pack_stack(layout: WeightLayout, q: QuantizedTensor, experts: int) -> dict[str, np.ndarray]:
    """The arrays of :func:`stack_parts`; ``q`` has the matrices one below the other."""
    o = len(q.codes) // experts
    packed = [layout.pack(q.take(slice(e * o, (e + 1) * o))) for e in range(experts)]
    return {name: np.stack([p[name] for p in packed]) for name in packed[0]}


def unpack_stack(layout: WeightLayout, parts: dict[str, np.ndarray], scheme: Scheme, o: int, k: int) -> QuantizedTensor:
    """The inverse of :func:`pack_stack`."""
    experts = len(next(iter(parts.values())))
    return concatenated([layout.unpack({n: a[e] for n, a in parts.items()}, scheme, o, k) for e in range(experts)])


def of_target(target: Target) -> Sequence[WeightLayout]:
    """The layouts of a target, in order of preference; none where its kernels take no quantized weights."""
    from llmc import targets

    listed = getattr(targets.module_for(target), "layouts", None)
    return () if listed is None else listed(target)


def choose(scheme: Scheme, o: int, k: int, target: Target) -> tuple[WeightLayout | None, str]:
    """The first layout of ``target`` that stores a [o, k] matrix of ``scheme``; without one, None and every layout's reason."""
    reasons = []
    for layout in of_target(target):
        why = layout.takes(scheme, o, k, target)
        if why is None:
            return layout, ""
        reasons.append(why)
    return None, "; ".join(reasons) or f"{target.name} has no kernels for quantized weights"
