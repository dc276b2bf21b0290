"""Converters from ATen and boundary ops to the flat graph. Each module registers its own; :data:`CONVERTERS` is the whole table."""

from llmc.importer.aten import boundary, complex, elementwise, index, nn, reduce, shape
from llmc.importer.aten.registry import CONVERTERS

__all__ = ["CONVERTERS", "boundary", "complex", "elementwise", "index", "nn", "reduce", "shape"]
