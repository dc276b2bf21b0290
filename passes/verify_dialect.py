"""The invariants of the dialect, checked after every pass: a defect is reported with the pass that made it.

- the function is well formed, one dataflow block, every variable bound once before it is read;
- a dialect operator has the operands, attributes and shapes that its module says;
- weights are known to the parameter table with the same shape and dtype, and none is unused;
- after the lowering no dialect operator is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from llmc.dialect.core import PREFIX, attrs_of
from llmc.dialect.linear import ACTIVATIONS, GATED, is_gated
from llmc.dialect.quantized import ACTIVATION_DTYPES
from llmc.dialect.rope_append import key_dim
from llmc.errors import InternalError
from llmc.importer.params import ParamTable
from llmc.kv_layout import page_layout
from llmc.passes.fuse_norm import is_ones
from llmc.passes.rewrite import Graph, op_name
from llmc.passes.shapes import dims, dtype_of, first_result, same_dim, same_shape

Shapes = list[list[Any]]
Check = Callable[[Shapes, dict[str, Any]], str]
"""Takes the operands' shapes (the result's last, of several the first) and the attributes; returns what is wrong, or ""."""


def _expect(*conditions: tuple[bool, str]) -> str:
    return next((message for holds, message in conditions if not holds), "")


def _linear(s: Shapes, a: dict[str, Any]) -> str:
    count = 3 + a["bias"] + a["residual"]
    if len(s) != count or len(s[1]) != 2:
        return f"{len(s) - 1} operands for bias={a['bias']} and residual={a['residual']}, weight of rank {len(s[1])}"
    return _expect(
        (same_dim(s[0][-1], s[1][1]), f"x has {s[0][-1]} columns and the weight {s[1][1]}"),
        (not a["bias"] or same_shape(s[2], s[1][:1]), "the bias is not one value per output"),
        (not a["residual"] or same_shape(s[-2], s[-1]), "the residual does not have the shape of the result"),
        (a["activation"].removesuffix(GATED) in ACTIVATIONS, f"unknown activation {a['activation']}"),
        (not is_gated(a["activation"]) or s[1][0] == 2 * s[-1][1], f"{s[1][0]} gated outputs for {s[-1][1]} results"),
    )


def _quantized_linear(s: Shapes, a: dict[str, Any]) -> str:
    last, result = s[-2], s[-1]
    return _expect(
        (len(s) > 2 + a["bias"] + a["residual"], f"{len(s) - 1} operands for bias={a['bias']} and residual={a['residual']}"),
        (same_dim(s[0][-1], a["k"]), f"x has {s[0][-1]} columns and the weight {a['k']}"),
        (not a["bias"] or s[-2 - a["residual"]] == [a["o"]], "the bias is not one value per output"),
        (not a["residual"] or same_shape(last, result), "the residual does not have the shape of the result"),
        (a["activation"].removesuffix(GATED) in ACTIVATIONS, f"unknown activation {a['activation']}"),
        (not is_gated(a["activation"]) or a["o"] == 2 * result[1], f"{a['o']} gated outputs for {result[1]} results"),
        (a["activations"] in ACTIVATION_DTYPES, f"unknown dtype of activations {a['activations']}"),
    )


def _norm_linear(s: Shapes, a: dict[str, Any]) -> str:
    return _quantized_linear(s, a) if "scheme" in a else _linear(s, a)


def _quantized_take(s: Shapes, a: dict[str, Any]) -> str:
    return _expect((len(s) > 2 and len(s[0]) == 1, f"ids of rank {len(s[0])} and {len(s) - 2} parts"))


def _norm(operand_count: int) -> Check:
    def check(s: Shapes, _: dict[str, Any]) -> str:
        vectors = s[1:-1]
        return _expect(
            (len(s) == operand_count + 1, f"{len(s) - 1} operands, not {operand_count}"),
            (all(same_shape(v, s[0][-1:]) for v in vectors), "a weight or bias is not a vector over the last axis"),
        )

    return check


def _rope(s: Shapes, a: dict[str, Any]) -> str:
    r = a["rotary_dim"]
    table = [s[0][0], r]
    return _expect(
        (len(s) == 4 and len(s[0]) == 3, "operands are not x [n, h, d], cos, sin"),
        (r % 2 == 0 and r <= s[0][-1], f"rotary_dim {r} for a head of {s[0][-1]}"),
        (same_shape(s[1], table) and same_shape(s[2], table), f"cos and sin are not {table}"),
    )


def _attention(s: Shapes, a: dict[str, Any]) -> str:
    q, k, v = s[:3]
    return _expect(
        (len(s) == 4 + a["sinks"] and [len(x) for x in (q, k, v)] == [3, 3, 3], "operands are not q, k, v [n, h, d] (and sinks)"),
        (q[1] % k[1] == 0 and k[1] == v[1], f"{q[1]} query heads over {k[1]} key and {v[1]} value heads"),
        (q[2] == k[2], f"queries of {q[2]} and keys of {k[2]} values"),
        (not a["sinks"] or s[3] == [q[1]], "sinks are not one value per query head"),
    )


def _page_width(a: dict[str, Any], d: int, dv: int) -> int:
    return page_layout(a.get("kv_scheme", "float32"), a["page_size"], d, dv).width


def _append(s: Shapes, a: dict[str, Any]) -> str:
    k, v, slots, pages = s[:4]
    return _expect(
        (len(s) == 5 and same_dim(k[0], slots[0]) and same_dim(k[0], v[0]), "k, v and slot_mapping differ in rows"),
        (pages[1] == k[1] and pages[2] == _page_width(a, k[2], v[2]), f"pages {pages} for k {k} and v {v}"),
    )


def _rope_append(s: Shapes, a: dict[str, Any]) -> str:
    qkv, cos, sin, slots, pages = s[:5]
    q, (_, kv_heads, width), r = s[-1], pages, a["rotary_dim"]
    return _expect(
        (len(s) == 6 + 2 * a["norm"], f"{len(s) - 1} operands for norm={a['norm']}"),
        (width == _page_width(a, q[2], a["v_dim"]), f"pages {pages} for heads of {q[2]} and {a['v_dim']}"),
        (qkv[1] == (q[1] + kv_heads) * q[2] + kv_heads * a["v_dim"], f"rows of {qkv[1]} for q {q} and pages {pages}"),
        (r % 2 == 0 and r <= q[2], f"rotary_dim {r} for a head of {q[2]}"),
        (same_shape(cos, [qkv[0], r]) and same_shape(sin, cos) and same_dim(slots[0], qkv[0]), "cos, sin and slots differ in rows"),
        (all(w == [q[2]] for w in s[5:-1]), "a norm weight is not a vector over a head"),
    )


def _rope_attend(s: Shapes, a: dict[str, Any]) -> str:
    """The operands of both operators, and of attention the queries that the rotated ones would be."""
    norms = 2 * a["norm"]
    if len(s) != 9 + norms + a["sinks"]:
        return f"{len(s) - 1} operands for norm={a['norm']}, sinks={a['sinks']}"
    (qkv, pages, out), state = (s[0], s[4], s[-1]), s[5:8]
    d = key_dim(qkv[1], a["heads"], pages[1], a["v_dim"])
    q = [qkv[0], a["heads"], d]
    append = _rope_append([*s[:5], *s[8 : 8 + norms], q], a)
    return append or _attend([q, pages, *state, *s[8 + norms : -1], out], a)


def _attend(s: Shapes, a: dict[str, Any]) -> str:
    q, pages, table, lengths, starts = s[:5]
    return _expect(
        (len(s) == 6 + a["sinks"], f"{len(s) - 1} operands for sinks={a['sinks']}"),
        (q[1] % pages[1] == 0 and pages[2] == _page_width(a, q[2], a["v_dim"]), f"pages {pages} for q {q}"),
        (
            same_dim(table[0], lengths[0]) and same_dim(starts[0], lengths[0] + 1),
            "block_table, seq_lens and q_indptr differ in sequences",
        ),
    )


def _moe(s: Shapes, a: dict[str, Any]) -> str:
    x, ids, weights, up, down = s[:5]
    return _expect(
        (len(s) == 6 + 2 * a["bias"] and len(up) == 3 and len(down) == 3, "operands do not fit the attribute bias"),
        (
            same_shape(ids, [x[0], a["top_k"]]) and same_shape(weights, ids),
            f"ids {ids} and weights {weights} for top_k={a['top_k']}",
        ),
        (up[0] == down[0] and up[2] == x[1] and down[1] == x[1], f"experts {up} and {down} for x {x}"),
        (up[1] == (1 + a["gated"]) * down[2], f"{up[1]} hidden rows for {down[2]} inputs of down, gated={a['gated']}"),
        (a["activation"] in ACTIVATIONS, f"unknown activation {a['activation']}"),
    )


def _quantized_moe(s: Shapes, a: dict[str, Any]) -> str:
    x, ids, weights = s[:3]
    return _expect(
        (len(s) > 5 + 2 * a["bias"] and all(part[0] == a["experts"] for part in s[3:-1]), "operands do not fit the experts"),
        (
            same_shape(ids, [x[0], a["top_k"]]) and same_shape(weights, ids),
            f"ids {ids} and weights {weights} for top_k={a['top_k']}",
        ),
        (x[1] == a["hidden"], f"experts of width {a['hidden']} for x {x}"),
        (a["activation"] in ACTIVATIONS, f"unknown activation {a['activation']}"),
        (a["activations"] in ACTIVATION_DTYPES, f"unknown dtype of activations {a['activations']}"),
    )


def _row_starts(s: Shapes, _: dict[str, Any]) -> str:
    fits = len(s) == 4 and len(s[0]) == 1 and same_dim(s[1][0], s[2][0] + 1)
    return _expect((fits, f"operands {s[:-1]} are not logit_rows, q_indptr, seq_lens"))


def _topk(s: Shapes, a: dict[str, Any]) -> str:
    return _expect((len(s) == 2 and len(s[0]) == 2 and 0 < a["k"] <= s[0][1], f"k={a['k']} of {s[0]}"))


CHECKS: dict[str, Check] = {
    "llmc.linear": _linear,
    "llmc.quantized_linear": _quantized_linear,
    "llmc.norm_linear": _norm_linear,
    "llmc.quantized_take": _quantized_take,
    "llmc.rms_norm": _norm(2),
    "llmc.layer_norm": _norm(3),
    "llmc.rope": _rope,
    "llmc.attention": _attention,
    "llmc.append": _append,
    "llmc.rope_append": _rope_append,
    "llmc.rope_attend": _rope_attend,
    "llmc.attend": _attend,
    "llmc.moe": _moe,
    "llmc.quantized_moe": _quantized_moe,
    "llmc.topk": _topk,
    "llmc.row_starts": _row_starts,
}


class Verifier:
    """Checks graphs and modules; a call seen before is not checked again, so a pass pays for what it changed."""

    def __init__(self, params: ParamTable) -> None:
        self.params = params
        self._seen: set[relax.Expr] = set()
        self._builder = relax.BlockBuilder()

    def graph(self, stage: str, graph: Graph) -> None:
        """Raises InternalError naming ``stage`` and the binding if an invariant does not hold."""
        module = graph.module()
        self._well_formed(stage, graph.name, module, check_types=False)  # types are checked below, for what is new
        for var, value in graph.bindings:
            name = op_name(value)
            if not name.startswith(PREFIX) or value in self._seen:
                continue
            problem = self._problem(name, var, value)
            if problem:
                raise InternalError(f"after pass {stage}: {graph.name}: {var.name} = {name}: {problem}")
            self._seen.add(value)
        self._weights(stage, graph)

    def _well_formed(self, stage: str, name: str, module: tvm.IRModule, check_types: bool) -> None:
        try:
            relax.analysis.well_formed(module, check_types)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InternalError(f"after pass {stage}: {name} is not well formed: {error}") from error

    def _problem(self, name: str, var: relax.Var, value: relax.Call) -> str:
        if name not in CHECKS:
            return "no such operator in the dialect"
        try:
            attrs = attrs_of(value)
            problem = CHECKS[name]([*(dims(a) for a in value.args), dims(first_result(var))], attrs)
        except (KeyError, IndexError, ValueError) as error:
            return f"an operand or attribute is missing ({error!r})"
        if problem:
            return problem
        inferred = self._builder.normalize(relax.Call(value.op, list(value.args), value.attrs)).ty
        return "" if tvm_ffi.structural_equal(inferred, var.ty) else f"its type is {var.ty}, and its operands give {inferred}"

    def _weights(self, stage: str, graph: Graph) -> None:
        uses = graph.uses()
        weights = graph.params[graph.inputs :]
        for var in weights:
            if var.name not in self.params:
                raise InternalError(f"after pass {stage}: {graph.name} has the parameter {var.name}, which the table does not know")
            held = self.params[var.name]
            if var not in uses and not is_ones(var):  # of a norm that one phase's layers took in and the other's did not
                raise InternalError(f"after pass {stage}: {graph.name} has the parameter {var.name} and does not read it")
            if dims(var) != list(held.shape) or dtype_of(var) != held.dtype:
                found = f"{held.dtype}{list(held.shape)}"
                raise InternalError(
                    f"after pass {stage}: parameter {var.name} is {var.ty} in {graph.name} and {found} in the table"
                )
        unused = set(self.params) - {p.name for p in weights}
        if unused:
            raise InternalError(f"after pass {stage}: the table holds weights that {graph.name} does not take: {sorted(unused)}")

    def module(self, stage: str, module: tvm.IRModule) -> None:
        """Raises InternalError naming ``stage`` if a lowered module is not well formed or a dialect operator is left in it."""
        self._well_formed(stage, "the module", module, check_types=True)
        for var, function in module.functions.items():
            if not isinstance(function, relax.Function) or not isinstance(function.body, relax.SeqExpr):
                continue
            for block in function.body.blocks:
                for b in block.bindings:
                    if op_name(b.value).startswith(PREFIX):
                        raise InternalError(
                            f"after pass {stage}: {var.name_hint}: {b.var.name} = {op_name(b.value)} was not lowered"
                        )
