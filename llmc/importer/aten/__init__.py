"""Converters from ATen and boundary ops to the flat graph: each module registers its own, :func:`convert` finds a node's."""

from __future__ import annotations

from typing import Any

import torch

from llmc.importer.aten import boundary, complex, elementwise, index, nn, reduce, shape
from llmc.importer.aten.registry import CONVERTERS
from llmc.importer.report import Refused
from llmc.importer.values import MaskMarker
from llmc.importer.walker import Walker

__all__ = ["CONVERTERS", "boundary", "complex", "convert", "elementwise", "index", "nn", "reduce", "shape"]

# Ops that take a mask marker as an operand, and ops that only crop, cast or spread it.
_TAKE_MASKS = frozenset({"llmc.attention", "aten.scaled_dot_product_attention"})
_KEEP_MASKS = frozenset(
    {"aten.slice", "aten.to", "aten._to_copy", "aten.alias", "aten.clone", "aten.contiguous", "aten.expand", "aten.detach"}
)


def convert(w: Walker, node: torch.fx.Node, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The value of ``node``, a call of op ``name`` on values. Raises Refused with the reason where there is no translation."""
    converter = CONVERTERS.get(name)
    if converter is None:
        raise Refused("no conversion for this operator")
    if any(isinstance(a, MaskMarker) for a in args) and name not in _TAKE_MASKS:
        if name in _KEEP_MASKS:
            return args[0]
        raise Refused("a mask that the model changes itself")
    if any(isinstance(a, complex.Complex) for a in args):
        return complex.convert(w, node, name, args)
    return converter(w, node, *args, **kwargs)
