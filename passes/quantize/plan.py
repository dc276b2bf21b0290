"""Which matrix gets which scheme, and why one gets none: the user's options applied to a graph.

``assign`` runs before projections are merged, so that only what is stored alike is joined: it sets ``Param.scheme`` of every
matrix to be quantized and records the others with their reason. Eligible are matrices that only ``llmc.linear`` and row lookups
read. A router (its result picks experts) stays as it is: it is tiny, and one wrong pick costs more than it saves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tvm import relax

from llmc.importer.params import DTYPES, Param, ParamTable
from llmc.passes.quantize.native import column_order, native_scheme
from llmc.passes.quantize.options import INT8_ROW, NATIVE, NONE, QuantOptions
from llmc.passes.quantize.report import Stored
from llmc.passes.quantize.scheme import scheme
from llmc.passes.rewrite import Graph, op_name, operands
from llmc.passes.shapes import dims
from llmc.targets.base import Target

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
OUTER_SCHEME = INT8_ROW
"""What the embedding and the output matrix get where a scheme of fewer bits is asked for everything."""
FINER = {"cpu": {"int8": "int8_g32"}}
"""By kind of target, what a scheme's name stands for there: kernels of a CPU scale blocks of 32 columns anyway, so 0.5 bits more
halve the squared error of 8-bit weights and cost no time. ``int8_row`` is a scale for a whole row everywhere."""


@dataclass
class Plan:
    """The options, and what was done: one entry per matrix of the graph. ``free``: names of matrices whose scheme a budget
    decides."""

    options: QuantOptions = field(default_factory=QuantOptions)
    stored: list[Stored] = field(default_factory=list)
    free: set[str] = field(default_factory=set)


def assign(graph: Graph, params: ParamTable, plan: Plan, target: Target) -> None:
    """Set ``Param.scheme`` of the matrices that the options name, and record those that stay as they are."""
    readers = graph.readers()
    routers = _routers(graph)
    vocab = dims(graph.output)[-1]
    for var in graph.params[graph.inputs :]:
        param = params[var.name]
        if len(param.shape) < 2 or not param.dtype.startswith(("float", "bfloat")):
            plan.stored.append(Stored(param.name, param.shape, param.dtype, dtype_bits(param.dtype)))
            continue
        uses = readers[var]
        roles = {op_name(value) for _, value in uses}
        head = "llmc.linear" in roles and param.shape[0] == vocab
        names = [param.name, *([HEAD] if head else []), *([EMBEDDING] if "relax.take" in roles else [])]
        kept = _exception(plan.options, names, param)
        chosen, refusal = _default(plan.options, names, param) if kept is None else kept, ""
        if chosen != NONE:
            router = any(result in routers for result, _ in uses)
            refusal = _refusal(var, uses, router, chosen == native_scheme(param.source) and column_order(param.source) is not None)
        if chosen == NONE or refusal:
            plan.stored.append(Stored(param.name, param.shape, param.dtype, dtype_bits(param.dtype), reason=refusal))
        else:
            held = chosen == native_scheme(param.source)
            param.scheme = scheme(chosen if held else FINER.get(target.kind, {}).get(chosen, chosen)).name
            if plan.options.target_bpw is not None and kept is None:
                plan.free.add(param.name)


def dtype_bits(dtype: str) -> float:
    return 8.0 * DTYPES[dtype].itemsize


def _exception(options: QuantOptions, names: list[str], param: Param) -> str | None:
    """What the first exception that fits one of ``names`` says: a scheme or ``"none"``; None if none fits."""
    for pattern, kept in options.exceptions:
        if any(re.search(pattern, name) for name in names):
            return (native_scheme(param.source) or NONE) if kept == NATIVE else kept
    return None


def _default(options: QuantOptions, names: list[str], param: Param) -> str:
    """The scheme that a matrix going by ``names`` gets without an exception; ``"none"`` for none."""
    if options.default == NATIVE:
        return native_scheme(param.source) or NONE
    if options.default != NONE and len(names) > 1 and scheme(options.default).bits < 8:
        return OUTER_SCHEME
    return options.default


def _routers(graph: Graph) -> set[relax.Var]:
    """Values that nothing but the choice of experts depends on: walked back from every ``llmc.topk``."""
    values = dict(graph.bindings)
    weights = set(graph.params)
    waiting = [v for _, value in graph.bindings if op_name(value) == "llmc.topk" for v in operands(value)]
    found: set[relax.Var] = set()
    while waiting:
        var = waiting.pop()
        if var in found or var in weights or var not in values:
            continue
        found.add(var)
        if op_name(values[var]) != "llmc.linear":
            waiting += operands(values[var])
    return found


def _refusal(var: relax.Var, uses: list[tuple[relax.Var, Any]], router: bool, reordered: bool) -> str:
    """Why ``var`` cannot be quantized, or an empty string."""
    if router:
        return "it picks the experts"
    for _, value in uses:
        name = op_name(value)
        if reordered and name == "relax.take":
            return "the checkpoint stores its columns in another order, and rows of it are looked up"
        if name == "llmc.moe" and any(value.args[i].same_as(var) for i in (3, 4)):
            if reordered:
                return "the checkpoint stores the columns of these experts in another order"
            continue
        linear = name == "llmc.linear" and value.args[1].same_as(var)
        lookup = (
            name == "relax.take"
            and value.args[0].same_as(var)
            and int(value.attrs.axis) == 0
            and len(dims(var)) == len(dims(value.args[1])) + 1 == 2
        )
        if not linear and not lookup:
            return f"{name} reads it, which takes no quantized weight"
    return ""
