"""``llmc.rope_attend``: ``llmc.rope_append`` and the ``llmc.attend`` behind it, as one operator of the decode phase.

``qkv [b, hq·d + hk·d + hk·dv]``, ``cos [b, r]``, ``sin [b, r]``, ``slot_mapping [b] i32``, ``kv_pages [num_pages, hk, ...]``,
``block_table [b, m] i32``, ``seq_lens [b] i32``, ``q_indptr [b+1] i32``, (``q_weight [d]``, ``k_weight [d]``), (``sinks [hq]``)
-> ``(out [b, hq, dv], kv_pages)``, the pages updated in place.

Row s is the last position of sequence s, and ``slot_mapping[s]`` the slot that the block table has for it, or negative where the
sequence is empty. Attributes are those of both operators; the rotated queries are seen by nobody else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import TensorType, TupleType

from llmc.dialect.core import attrs_of, call, register
from llmc.dialect.paged import attend_reference
from llmc.dialect.rope_append import reference as rope_append_reference

OP = "llmc.rope_attend"
INPUTS = 5
"""Operands that ``llmc.rope_append`` has before its norm weights."""

STATE = 3
"""Operands of ``llmc.attend`` behind its pages, before its sinks."""


def rope_attend(append: relax.Call, attend: relax.Call) -> relax.Call:
    """The operator for a call of ``llmc.rope_append`` and a call of ``llmc.attend`` that reads its two results."""
    state = list(attend.args)[2:]
    args = [*append.args[:INPUTS], *state[:STATE], *append.args[INPUTS:], *state[STATE:]]
    return call(OP, *args, **attrs_of(append), **{k: v for k, v in attrs_of(attend).items() if k not in attrs_of(append)})


def _infer(c: relax.Call, _: relax.BlockBuilder) -> TupleType:
    qkv, pages = c.args[0].ty, c.args[4].ty
    return TupleType([TensorType([qkv.shape[0], int(c.attrs["heads"]), int(c.attrs["v_dim"])], qkv.dtype), pages])


register(OP, _infer)


def reference(
    *operands: np.ndarray,
    heads: int,
    v_dim: int,
    page_size: int,
    rotary_dim: int,
    interleaved: int,
    norm: int,
    eps: float,
    offset: float,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: int,
    kv_scheme: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """float64 reference: the result, and a copy of ``kv_pages`` with the rows written (cast to the pages' dtype, or quantized)."""
    first, state, rest = operands[:INPUTS], operands[INPUTS : INPUTS + STATE], operands[INPUTS + STATE :]
    stored: dict[str, Any] = {"page_size": page_size, "v_dim": v_dim, "kv_scheme": kv_scheme}
    q, pages = rope_append_reference(
        *first, *rest[: 2 * norm], heads=heads, rotary_dim=rotary_dim, interleaved=interleaved, norm=norm, eps=eps, offset=offset,
        **stored,
    )  # fmt: skip
    out = attend_reference(q, pages, *state, *rest[2 * norm :], scale=scale, window=window, chunk=chunk, softcap=softcap, **stored)
    return out, pages
