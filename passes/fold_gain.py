"""The weight of an RMS norm that only linear layers read goes into their columns; the norm keeps ones.

before::                                    after::

    h = llmc.rms_norm(x, g, offset)             h = llmc.rms_norm(x, ones)
    y = llmc.linear(h, w)                       y = llmc.linear(h, w · diag(g + offset))

The result is the same but for rounding: columns of the stored weight are rounded where the norm's result was. A norm of ones is a
factor for each row, which :mod:`.fold_norm` lets kernels apply to their sums. The layers' weights are read by nothing else, and
hold numbers: codes of a quantized checkpoint stay what they are.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of
from llmc.dialect.norm import RMS_NORM, rms_norm
from llmc.importer.params import DTYPES, Constant, Mapped, Param, ParamTable, Source
from llmc.passes.fuse_norm import is_ones, ones_name
from llmc.passes.quantize.native import native_scheme
from llmc.passes.rewrite import Graph, Rewriter, op_name, operands, rewrite
from llmc.passes.shapes import dims

ROWS = 4096
"""Of a matrix that are widened at a time."""


def fold_gain(graph: Graph, params: ParamTable) -> None:
    """Move weights of norms into the weights of the layers behind them; ``params`` gets the products as sources."""
    uses, readers, weights = graph.uses(), graph.readers(), set(graph.params[graph.inputs :])

    def takes(h: relax.Var, layer: relax.Expr) -> bool:
        """Whether ``layer`` is linear in h, and its weight is its own."""
        if op_name(layer) != "llmc.linear" or not layer.args[0].same_as(h) or operands(layer).count(h) != 1:
            return False
        weight = layer.args[1]
        return weight in weights and uses[weight] == 1 and not native_scheme(params[weight.name].source)

    ones: dict[int, relax.Var] = {int(dims(p)[0]): p for p in graph.params if is_ones(p)}

    def rule(work: Rewriter, h: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) != RMS_NORM or h.same_as(graph.output) or not readers[h]:
            return None
        x, gain = value.args
        if gain not in weights or is_ones(gain) or not all(takes(h, layer) for _, layer in readers[h]):
            return None
        size, attrs = int(dims(gain)[0]), attrs_of(value)
        for _, layer in readers[h]:
            param = params[layer.args[1].name]
            param.source = _scaled(param, params[gain.name].source, attrs["offset"])
        if size not in ones:
            name = ones_name(size)
            params.add(name, Constant(np.ones(size, np.float32), name))
            ones[size] = relax.Var(name, TensorType([size], "float32"))
            graph.params.append(ones[size])
        return rms_norm(x, ones[size], attrs["eps"])

    rewrite(graph, rule)
    graph.remove_unused_params(params)


def _scaled(param: Param, gain: Source, offset: float) -> Source:
    """The matrix of ``param`` with its columns multiplied by ``gain`` + ``offset``, rounded once to what it is stored in."""
    dtype = DTYPES[param.dtype]

    def scaled(matrix: np.ndarray, gain: np.ndarray) -> np.ndarray:
        factors, out = gain.astype(np.float32) + np.float32(offset), np.empty(matrix.shape, dtype)
        for row in range(0, len(matrix), ROWS):
            out[row : row + ROWS] = matrix[row : row + ROWS].astype(np.float32) * factors
        return out

    return Mapped((param.source, gain), scaled, param.shape, param.dtype, "scaled")
