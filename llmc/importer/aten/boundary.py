"""The boundary ops: attention, mask markers, expert dispatch, and PyTorch's own fused attention where a model calls it itself."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax

from llmc.dialect.attention import attention as attention_op
from llmc.dialect.moe import moe as moe_op
from llmc.importer.aten.registry import converts
from llmc.importer.aten.shape import permuted
from llmc.importer.boundary import UNKNOWN
from llmc.importer.params import transposed as transposed_source
from llmc.importer.report import Refused
from llmc.importer.values import MaskMarker, Tensor, stored_shape
from llmc.importer.walker import Walker

R = relax.op


@converts("llmc.mask")
def mask(w: Walker, node: torch.fx.Node, *_: Any) -> MaskMarker:
    arguments: tuple[Any, ...] = node.args
    window, chunk, problem = arguments[3:]
    return MaskMarker(int(window), int(chunk), str(problem))


def token_major(w: Walker, a: Tensor) -> relax.Expr:
    """[1, h, s, d] as [s, h, d]."""
    turned = permuted(w, a, [0, 2, 1, 3])
    stored = stored_shape(turned.shape)
    return turned.expr if len(stored) == 3 else w.emit(R.reshape(turned.expr, w.prims(turned.shape[1:])))


def attend(
    w: Walker,
    node: torch.fx.Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: MaskMarker,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Emit ``llmc.attention``; the result is the torch shape [1, s, hq, dv]."""
    if rule.problem:
        raise Refused(rule.problem)
    expr = attention_op(
        token_major(w, q), token_major(w, k), token_major(w, v), None if sinks is None else sinks.expr,
        scale=scale, layer=w.attention_layers, window=rule.window, chunk=rule.chunk, softcap=softcap,
    )  # fmt: skip
    w.attention_layers += 1
    shape = (1, q.shape[2], q.shape[1], v.shape[3])
    stored = stored_shape(shape)
    value = w.emit(expr)
    return Tensor(value if len(stored) == 3 else w.emit(R.reshape(value, w.prims(stored))), shape, q.dtype)


def mask_rule(mask: Any) -> MaskMarker:
    if mask is None:
        return MaskMarker(-1, -1, "")
    if not isinstance(mask, MaskMarker):
        raise Refused("an attention mask or bias that the model computes itself (ALiBi, relative positions)")
    return mask


@converts("llmc.attention")
def attention(
    w: Walker,
    node: torch.fx.Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    problem: str,
) -> Tensor:
    if problem:
        raise Refused(problem)
    return attend(w, node, q, k, v, mask_rule(mask), sinks, scale, softcap)


@converts("aten.scaled_dot_product_attention")
def scaled_dot_product_attention(
    w: Walker, node: torch.fx.Node, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """A model that calls PyTorch's attention itself: causal, or under one of our mask markers."""
    if attn_mask is None and not is_causal:
        raise Refused("bidirectional attention")
    width = q.shape[3]
    if scale is None and not isinstance(width, int):
        raise Refused("attention over heads of unknown width")
    factor = scale if scale is not None else float(width) ** -0.5
    value = attend(w, node, q, k, v, mask_rule(attn_mask), None, factor, 0.0)
    return permuted(w, value, [0, 2, 1, 3])


def expert_matrix(w: Walker, weight: Tensor, transposed: bool) -> relax.Expr:
    """Packed experts as [E, o, k], the layout ``llmc.moe`` reads; a transposed checkpoint is turned while streaming."""
    if not transposed:
        return weight.param if weight.param is not None else w.restored(weight)
    var = weight.param
    if var is None:
        raise Refused("expert matrices that are not parameters")
    return w.parameter(f"{var.name}.T", transposed_source(w.params[var.name].source), weight.dtype)


@converts("llmc.moe")
def moe(
    w: Walker, node: torch.fx.Node, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, gated: bool, transposed: bool, interleave: bool,
    alpha: float, limit: float, offset: float,
) -> Tensor:  # fmt: skip
    if activation == UNKNOWN:
        raise Refused("experts whose gating is none of silu, gelu, relu and their kin, clipped or not")
    expr = moe_op(
        x.expr, ids.expr, w.cast(weights, x.dtype).expr, expert_matrix(w, gate_up, transposed), expert_matrix(w, down, transposed),
        None if gate_up_bias is None else gate_up_bias.expr, None if down_bias is None else down_bias.expr,
        top_k=int(ids.shape[-1]), activation=activation, gated=gated, interleave=interleave,
        alpha=alpha, limit=limit, offset=offset,
    )  # fmt: skip
    return w.like(node, expr)
