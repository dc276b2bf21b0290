"""Matrices with a scheme -> their packed parts, and the operators that read them -> the quantized ones.

before::                                    after::

    e = astype(take(w, ids), float32)           e = llmc.quantized_take(ids, w.codes, w.scales, ...)
    y = llmc.linear(x, v, b, h)                 y = llmc.quantized_linear(x, v.panels, b, h, scheme="int4_g32", ...)

A parameter ``w`` becomes the parameters ``w.codes``, ``w.scales``, ... of the target's layout. Where a checkpoint stores columns in
another order than the model's (GPTQ's act-order), x is taken in that order: ``take(x, w.columns, axis=1)``.

A matrix that the target has no layout for stays what it was, which is recorded; one with two levels of scales is stored with
one, if that is what the target takes (the same values in more bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of
from llmc.dialect.quantized import quantized_linear, quantized_take
from llmc.importer.params import Constant, Param, ParamTable
from llmc.passes.quantize.packed import Matrix, Part
from llmc.passes.quantize.plan import Plan, dtype_bits
from llmc.passes.quantize.report import Stored
from llmc.passes.quantize.scheme import Scheme, scheme
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dtype_of
from llmc.schedules import layouts
from llmc.targets.base import Target


@dataclass
class _Weight:
    """A matrix that was replaced: its parts, the attributes that say what they are, and the order of its columns if it has one."""

    parts: list[relax.Var]
    attrs: dict[str, Any]
    columns: relax.Var | None


def quantize_weights(graph: Graph, params: ParamTable, plan: Plan, target: Target) -> None:
    """Replace every parameter of ``graph`` that has a scheme; ``params`` gets the parts in its place, ``plan`` the record."""
    replaced: dict[relax.Var, _Weight] = {}
    signature: list[relax.Var] = graph.params[: graph.inputs]
    for var in graph.params[graph.inputs :]:
        weight = _replace(params, params[var.name], plan, target) if params[var.name].scheme else None
        if weight is None:
            signature.append(var)
        else:
            replaced[var] = weight
            signature += weight.parts if weight.columns is None else [*weight.parts, weight.columns]
    graph.params = signature
    activations = plan.options.activations or ("int8" if target.kind == "cpu" else "compute")
    rewrite(graph, lambda work, var, value: _rule(work, var, value, replaced, activations))


def _replace(params: ParamTable, param: Param, plan: Plan, target: Target) -> _Weight | None:
    """Parts for ``param`` in the table, or None with the reason in the plan if ``target`` stores no such matrix."""
    o, k = param.shape
    wanted = scheme(param.scheme)
    record = Stored(param.name, param.shape, wanted.name, wanted.bits_per_weight(k))
    layout, why = layouts.choose(wanted, o, k, target)
    stored: Scheme = wanted
    if layout is None and wanted.super_group:
        stored = wanted.flat()
        layout, _ = layouts.choose(stored, o, k, target)
        record.bits = stored.bits_per_weight(k)
        record.reason = f"with one level of float32 scales ({why})"
    plan.stored.append(record)
    if layout is None:
        record.scheme, record.bits, record.reason = param.dtype, dtype_bits(param.dtype), why
        param.scheme = ""
        return None
    matrix = Matrix(param.source, stored, layout, record)
    params.remove(param.name)
    variables = []
    for name, spec in layout.parts(stored, o, k).items():
        part = params.add(f"{param.name}.{name}", Part(matrix, name, spec))
        part.scheme = wanted.name
        variables.append(relax.Var(part.name, TensorType(list(part.shape), part.dtype)))
    columns = None
    if matrix.column_order is not None:
        order = params.add(f"{param.name}.columns", Constant(matrix.column_order.astype(np.int32), f"columns of {param.name}"))
        columns = relax.Var(order.name, TensorType([k], "int32"))
    return _Weight(variables, {"scheme": stored.name, "layout": layout.NAME, "o": o, "k": k}, columns)


def _rule(
    work: Rewriter, var: relax.Var, value: relax.Expr, replaced: dict[relax.Var, _Weight], activations: str
) -> relax.Expr | None:
    name = op_name(value)
    if name == "llmc.linear" and value.args[1] in replaced:
        weight, attrs = replaced[value.args[1]], attrs_of(value)
        rest = list(value.args[2:])
        bias = rest.pop(0) if attrs.pop("bias") else None
        residual = rest.pop(0) if attrs.pop("residual") else None
        x = (
            value.args[0]
            if weight.columns is None
            else work.emit(relax.op.take(value.args[0], weight.columns, axis=1, mode="clip"))
        )
        return quantized_linear(x, weight.parts, bias, residual, **weight.attrs, **attrs, activations=activations)
    if name == "relax.take" and value.args[0] in replaced:
        weight = replaced[value.args[0]]
        return quantized_take(value.args[1], weight.parts, **weight.attrs, out_dtype=dtype_of(var))
    if name == "relax.astype":  # rows come in the dtype they are wanted in, not by way of the one they were stored in
        taken = work.value(value.args[0], "llmc.quantized_take")
        if taken is not None and work.single_use(value.args[0]):
            attrs = attrs_of(taken) | {"out_dtype": dtype_of(var)}
            return quantized_take(taken.args[0], list(taken.args[1:]), **attrs)
    return None
