"""``llmc.rope_append``: what happens between the merged projection and attention, as one operator.

``qkv [n, hq·d + hk·d + hk·dv]`` (a row: the queries of all heads, the keys, the values), ``cos [n, r]``, ``sin [n, r]``,
``slot_mapping [n] i32``, ``kv_pages [num_pages, hk, ...]``, (``q_weight [d]``, ``k_weight [d]``)
-> ``(q [n, hq, d], kv_pages)``, the pages updated in place:

- with ``norm = 1``, queries and keys are RMS-normalised head by head first (``eps``, ``offset`` as in ``llmc.rms_norm``);
- queries and keys are rotated as in ``llmc.rope`` (``rotary_dim``, ``interleaved``);
- the rotated keys and the values go to their slots as in ``llmc.append`` (``page_size``, ``kv_scheme``), a row with a negative
  slot to none.

``heads`` is hq, ``v_dim`` is dv. Nothing is rounded to the storage dtype between the steps.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType, TupleType

from llmc.dialect.core import call, register
from llmc.dialect.norm import rms_norm_reference
from llmc.dialect.paged import append_reference
from llmc.dialect.rope import reference as rope_reference
from llmc.kv_layout import scheme_attr

OP = "llmc.rope_append"


def rope_append(
    qkv: relax.Expr,
    cos: relax.Expr,
    sin: relax.Expr,
    slot_mapping: relax.Expr,
    kv_pages: relax.Expr,
    norm_weights: tuple[relax.Expr, relax.Expr] | None = None,
    *,
    heads: int,
    v_dim: int,
    page_size: int,
    rotary_dim: int,
    interleaved: int = 0,
    eps: float = 0.0,
    offset: float = 0.0,
    kv_scheme: str = "",
) -> relax.Call:
    return call(
        OP, qkv, cos, sin, slot_mapping, kv_pages, *(norm_weights or ()), heads=int(heads), v_dim=int(v_dim),
        page_size=int(page_size), rotary_dim=int(rotary_dim), interleaved=int(interleaved), norm=int(norm_weights is not None),
        eps=float(eps), offset=float(offset), **scheme_attr(kv_scheme),
    )  # fmt: skip


def key_dim(row: int, heads: int, kv_heads: int, v_dim: int) -> int:
    """d, from the length of a row of ``qkv``."""
    return (row - kv_heads * v_dim) // (heads + kv_heads)


def _infer(c: relax.Call, _: relax.BlockBuilder) -> TupleType:
    qkv, pages, heads = c.args[0].ty, c.args[4].ty, int(c.attrs["heads"])
    d = key_dim(int(qkv.shape[1]), heads, int(pages.shape[1]), int(c.attrs["v_dim"]))
    return TupleType([TensorType([qkv.shape[0], heads, d], qkv.dtype), pages])


register(OP, _infer)


def reference(
    qkv: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    slot_mapping: np.ndarray,
    kv_pages: np.ndarray,
    q_weight: np.ndarray | None = None,
    k_weight: np.ndarray | None = None,
    *,
    heads: int,
    v_dim: int,
    page_size: int,
    rotary_dim: int,
    interleaved: int,
    norm: int,
    eps: float,
    offset: float,
    kv_scheme: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """float64 reference: the queries, and a copy of ``kv_pages`` with the rows written (cast to the pages' dtype, or quantized)."""
    n, kv_heads = qkv.shape[0], kv_pages.shape[1]
    d = key_dim(qkv.shape[1], heads, kv_heads, v_dim)
    q, k, v = np.split(qkv.astype(np.float64), [heads * d, (heads + kv_heads) * d], axis=1)
    if norm and (q_weight is None or k_weight is None):
        raise ValueError(f"{OP} with norm = {norm} needs q_weight and k_weight")
    turned = []
    for x, weight in ((q.reshape(n, heads, d), q_weight), (k.reshape(n, kv_heads, d), k_weight)):
        normed = x if weight is None else rms_norm_reference(x, weight, eps=eps, offset=offset)
        turned.append(rope_reference(normed, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved))
    values = v.reshape(n, kv_heads, v_dim)
    return turned[0], append_reference(turned[1], values, slot_mapping, kv_pages, page_size=page_size, kv_scheme=kv_scheme)
