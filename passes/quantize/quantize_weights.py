"""Matrices with a scheme -> their packed parts, and the operators that read them -> the quantized ones.

before::                                    after::

    e = astype(take(w, ids), float32)           e = llmc.quantized_take(ids, w.codes, w.scales, ...)
    y = llmc.linear(x, v, b, h)                 y = llmc.quantized_linear(x, v.panels, b, h, scheme="int4_g32", ...)
    y = llmc.moe(x, i, s, g, d)                 y = llmc.quantized_moe(x, i, s, g.panels, d.panels, ...)

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
from llmc.dialect.quantized_moe import STACKS, quantized_moe
from llmc.importer.params import Constant, Param, ParamTable
from llmc.passes.quantize.packed import Matrix, Part
from llmc.passes.quantize.plan import Plan, dtype_bits
from llmc.passes.quantize.report import Stored
from llmc.passes.quantize.rounded import rounding
from llmc.passes.quantize.scheme import Scheme, scheme
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dims, dtype_of
from llmc.schedules import layouts
from llmc.targets.base import Target


@dataclass
class _Weight:
    """A matrix that was replaced: its parts, the attributes that say what they are, the order of its columns if it has one, and
    what its layer's inputs are rounded to if its scheme says so."""

    parts: list[relax.Var]
    attrs: dict[str, Any]
    columns: relax.Var | None
    activations: str


def quantize_weights(graph: Graph, params: ParamTable, plan: Plan, target: Target) -> None:
    """Replace every parameter of ``graph`` that has a scheme; ``params`` gets the parts in its place, ``plan`` the record."""
    refused = _refused_experts(graph, params, target)
    replaced: dict[relax.Var, _Weight] = {}
    signature: list[relax.Var] = graph.params[: graph.inputs]
    for var in graph.params[graph.inputs :]:
        param = params[var.name]
        weight = _replace(params, param, plan, target, refused.get(param.name, "")) if param.scheme else None
        if weight is None:
            signature.append(var)
        else:
            replaced[var] = weight
            signature += weight.parts if weight.columns is None else [*weight.parts, weight.columns]
    graph.params = signature
    activations = plan.options.activations or ("int8" if target.kind == "cpu" else "compute")
    rewrite(graph, lambda work, var, value: _rule(work, var, value, replaced, activations))


def _refused_experts(graph: Graph, params: ParamTable, target: Target) -> dict[str, str]:
    """Stacks of experts with a scheme that must stay as they are, with the reason: both of a layer are quantized, or none."""
    refused: dict[str, str] = {}
    for _, value in graph.bindings:
        if op_name(value) != "llmc.moe":
            continue
        stacks = [params[v.name] for v in value.args[3:5] if v in graph.params]
        why = [_layout(p, target)[2] if p.scheme else f"the {p.name} of these experts stays as it is" for p in stacks]
        if found := "; ".join(filter(None, why)):
            refused |= dict.fromkeys((p.name for p in stacks), found)
    return refused


def _layout(param: Param, target: Target) -> tuple[layouts.WeightLayout | None, Scheme, str]:
    """The layout ``param``'s matrices are stored in, the scheme they then have, and why it is not the wanted one."""
    wanted, (o, k) = scheme(param.scheme), param.shape[-2:]
    layout, why = layouts.choose(wanted, o, k, target)
    if layout is None and wanted.super_group:
        layout, _ = layouts.choose(wanted.flat(), o, k, target)
        return layout, wanted.flat(), why
    return layout, wanted, why


def _replace(params: ParamTable, param: Param, plan: Plan, target: Target, refusal: str) -> _Weight | None:
    """Parts for ``param`` in the table, or None with the reason in the plan if ``target`` stores no such matrix or there is a
    ``refusal``."""
    (*experts, o, k), wanted = param.shape, scheme(param.scheme)
    layout, stored, why = _layout(param, target)
    record = Stored(param.name, param.shape, wanted.name, stored.bits_per_weight(k), reason=rounding(param.source)[1])
    plan.stored.append(record)
    if layout is None or refusal:
        record.scheme, record.bits, record.reason = param.dtype, dtype_bits(param.dtype), refusal or why
        param.scheme = ""
        return None
    if stored is not wanted:
        record.reason = f"with one level of float32 scales ({why})"
    activations = _activations(stored, layout, record)
    matrix = Matrix(param.source, stored, layout, record)
    params.remove(param.name)
    specs = layouts.stack_parts(layout, stored, experts[0], o, k) if experts else layout.parts(stored, o, k)
    variables = []
    for name, spec in specs.items():
        part = params.add(f"{param.name}.{name}", Part(matrix, name, spec))
        part.scheme = wanted.name
        variables.append(relax.Var(part.name, TensorType(list(part.shape), part.dtype)))
    columns = None
    if matrix.column_order is not None:
        order = params.add(f"{param.name}.columns", Constant(matrix.column_order.astype(np.int32), f"columns of {param.name}"))
        columns = relax.Var(order.name, TensorType([k], "int32"))
    return _Weight(variables, {"scheme": stored.name, "layout": layout.NAME, "o": o, "k": k}, columns, activations)


def _activations(how: Scheme, layout: layouts.WeightLayout, record: Stored) -> str:
    """What a layer's inputs are rounded to because its scheme says so, which is recorded; empty if the scheme leaves it open."""
    if not how.activations:
        return ""
    found = how.activations in layout.ACTIVATIONS
    what = f"inputs in {how.activations}" if found else f"inputs as they are: no kernel here rounds them to {how.activations}"
    record.reason = ", ".join(filter(None, (record.reason, what)))
    return how.activations if found else "compute"


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
        rounded = weight.activations or activations
        return quantized_linear(x, weight.parts, bias, residual, **weight.attrs, **attrs, activations=rounded)
    if name == "llmc.moe" and value.args[3] in replaced:
        return _experts(value, replaced, replaced[value.args[3]].activations or activations)
    if name == "relax.take" and value.args[0] in replaced:
        weight = replaced[value.args[0]]
        return quantized_take(value.args[1], weight.parts, **weight.attrs, out_dtype=dtype_of(var))
    if name == "relax.astype":  # rows come in the dtype they are wanted in, not by way of the one they were stored in
        taken = work.value(value.args[0], "llmc.quantized_take")
        if taken is not None and work.single_use(value.args[0]):
            attrs = attrs_of(taken) | {"out_dtype": dtype_of(var)}
            return quantized_take(taken.args[0], list(taken.args[1:]), **attrs)
    return None


def _experts(value: relax.Call, replaced: dict[relax.Var, _Weight], activations: str) -> relax.Call:
    """``llmc.quantized_moe`` in place of ``llmc.moe``."""
    stacks = [replaced[v] for v in value.args[3:5]]
    (hidden, inner), attrs = (stacks[1].attrs["o"], stacks[1].attrs["k"]), attrs_of(value)
    for name, stack in zip(STACKS, stacks, strict=True):
        attrs |= {f"{name}_scheme": stack.attrs["scheme"], f"{name}_layout": stack.attrs["layout"]}
    attrs |= {"experts": int(dims(value.args[3])[0]), "hidden": hidden, "inner": inner, "activations": activations}
    parts = [part for stack in stacks for part in stack.parts]
    attrs.pop("bias")
    x, ids, weights = value.args[:3]
    return quantized_moe(x, ids, weights, parts, list(value.args[5:]), **attrs)
