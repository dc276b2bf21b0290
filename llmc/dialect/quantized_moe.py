"""``llmc.quantized_moe``: :mod:`.moe` whose two stacks of expert matrices are quantized.

Operands: x [n, h], ids [n, t] int32, weights [n, t], the parts of gate_up, the parts of down and, iff ``bias = 1``, gate_up_bias
[E, w] and down_bias [E, h]; w = 2 i if gated, else i. A part has the experts as its first axis and behind it the shape that its
layout gives one expert's matrix. The result is [n, h].

Attributes are those of ``llmc.moe`` and ``experts`` E, ``hidden`` h, ``inner`` i; of each stack ``gate_up_scheme``,
``gate_up_layout``, ``down_scheme``, ``down_layout``; ``activations`` as in ``llmc.quantized_linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from llmc.dialect.core import call, register

OP = "llmc.quantized_moe"
STACKS = ("gate_up", "down")


def quantized_moe(
    x: relax.Expr,
    ids: relax.Expr,
    weights: relax.Expr,
    parts: Sequence[relax.Expr],
    biases: Sequence[relax.Expr] = (),
    **attrs: Any,
) -> relax.Call:
    """A call of the op; ``parts``: those of gate_up, then those of down; ``attrs``: all but ``bias``."""
    return call(OP, x, ids, weights, *parts, *biases, **{**attrs, "bias": int(bool(biases))})


def shape_of(attrs: dict[str, Any], stack: str) -> tuple[int, int]:
    """[o, k] of one expert's matrix in ``stack``."""
    if stack == "down":
        return attrs["hidden"], attrs["inner"]
    return (1 + attrs["gated"]) * attrs["inner"], attrs["hidden"]


register(OP, lambda c, _: c.args[0].ty)
