"""How a dialect op is registered with Relax, called, and read back.

An op is registered from Python (no C++): a type rule (``FInferType``) and purity. Attributes travel in a ``DictAttrs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op, register_op_attr

InferType = Callable[[relax.Call, relax.BlockBuilder], relax.TensorType]

PREFIX = "llmc."


def register(name: str, infer: InferType) -> None:
    """Register op ``name`` (``"llmc.linear"``) with its type rule. Dialect ops are pure until they are lowered."""
    register_op_attr(name, "FInferType", infer)
    register_op_attr(name, "FPurity", True)


def call(name: str, *args: relax.Expr, **attrs: Any) -> relax.Call:
    """A call of a dialect op. ``attrs`` may hold ints, floats, strings and lists of them."""
    node = tvm.ir.make_node("ir.DictAttrs", **attrs) if attrs else None
    return relax.Call(Op.get(name), list(args), node)


def is_call(expr: relax.Expr, name: str | None = None) -> bool:
    """Whether ``expr`` calls the dialect op ``name``, or any dialect op if no name is given."""
    if not isinstance(expr, relax.Call) or not isinstance(expr.op, Op):
        return False
    return expr.op.name == name if name else expr.op.name.startswith(PREFIX)


def attrs_of(expr: relax.Call) -> dict[str, Any]:
    """The attributes of a call as plain Python values."""
    if expr.attrs is None:
        return {}
    return {str(key): _plain(value) for key, value in expr.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tvm.tirx.IntImm):
        return int(value.value)
    if isinstance(value, tvm.tirx.FloatImm):
        return float(value.value)
    return [_plain(v) for v in value]
