"""A gated feed-forward layer's first half -> one linear layer.

before::                                    after::

    y = llmc.linear(x, w)                       m = llmc.linear(x, w, activation="silu_gated")
    g, u = y[:, :i], y[:, i:]
    m = multiply(nn.silu(g), u)

``y``, twice as wide as ``m``, is never written. Casts of 16-bit halves to float32 and of the product back go as well: the kernel
multiplies the float32 sums. Only where the target has a kernel for it in both phases, and nothing else reads ``y``.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from llmc.dialect.core import attrs_of, call
from llmc.dialect.linear import GATED
from llmc.passes.fuse_epilogue import ACTIVATION_OF
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import axis_slice, dims, dtype_of

LAYERS = ("llmc.linear", "llmc.quantized_linear")

Takes = Callable[[relax.Call, relax.Var], bool]
"""Whether the target has kernels for a call, given a variable of its result's type."""


def _half(work: Rewriter, expr: relax.Expr) -> tuple[relax.Expr, int] | None:
    """What an expression, maybe cast, is the left (0) or the right (1) half of the columns of."""
    cast = work.value(expr, "relax.astype")
    if cast is not None and work.single_use(expr):
        expr = cast.args[0]
    part = work.value(expr, "relax.strided_slice")
    if part is None or not work.single_use(expr):
        return None
    cut, shape = axis_slice(part), dims(part.args[0])
    if cut is None or len(shape) != 2 or shape[1] % 2:
        return None
    half = shape[1] // 2
    side = {(1, 0, half, 1): 0, (1, half, 2 * half, 1): 1}.get(cut)
    return None if side is None else (part.args[0], side)


def _product(work: Rewriter, value: relax.Call) -> relax.Call | None:
    """The gated layer that computes the product of an activated and another half of one linear layer's result."""
    for activated, factor in (value.args, reversed(list(value.args))):
        gate = work.value(activated)
        if op_name(gate) not in ACTIVATION_OF or not work.single_use(activated):
            continue
        left, right = _half(work, gate.args[0]), _half(work, factor)
        if left is None or right is None or not left[0].same_as(right[0]) or (left[1], right[1]) != (0, 1):
            continue
        layer = work.value(left[0])
        if op_name(layer) not in LAYERS or work.uses.get(left[0]) != 2:
            continue
        attrs = attrs_of(layer)
        if attrs["residual"] or attrs["activation"] != "none":
            continue
        return call(op_name(layer), *layer.args, **{**attrs, "activation": ACTIVATION_OF[op_name(gate)] + GATED})
    return None


def fuse_gated(graph: Graph, takes: Takes) -> None:
    """Merge what follows a layer of two halves into it, where ``takes`` says that there is a kernel."""

    def rule(work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) == "relax.astype" and work.single_use(value.args[0]):
            value = work.value(value.args[0])
        if op_name(value) != "relax.multiply":
            return None
        layer = _product(work, value)
        if layer is None:
            return None
        layer = work.normal(layer)
        fits = dtype_of(layer) == dtype_of(var) and takes(layer, relax.Var("y", layer.ty))
        return layer if fits else None

    rewrite(graph, rule)
