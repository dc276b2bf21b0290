"""``llmc.append`` and ``llmc.attend``: what attention is lowered to. All state is plain tensors that the caller owns.

The KV cache of one layer is ``kv_pages [num_pages, hk, page_size * (d + dv)]``: for a page and a KV head first the keys of its
``page_size`` slots (slot t at ``t * d``), then their values (slot t at ``page_size * d + t * dv``). Which page holds which
positions is the block table's matter (Kwon et al., 2023, "PagedAttention"). With an attribute ``kv_scheme`` (absent for floats)
the pages are bytes: codes and their parameters, where :mod:`llmc.kv_layout` says, quantized as :mod:`llmc.dialect.kv_codes` does.

``llmc.append(k [n, hk, d], v [n, hk, dv], slot_mapping [n] i32, kv_pages)`` -> kv_pages, updated in place: token i goes to slot
``slot_mapping[i] = page * page_size + offset``. A negative slot is skipped.

``llmc.attend(q [n, hq, d], kv_pages, block_table [b, m] i32, seq_lens [b] i32, q_indptr [b+1] i32, (sinks [hq]))``
-> ``[n, hq, dv]``: rows ``q_indptr[s] .. q_indptr[s+1]`` are the last rows of sequence s, whose length with them is
``seq_lens[s]``; position p of sequence s is in page ``block_table[s, p // page_size]``. Attributes as for
``llmc.attention``, plus ``page_size`` and ``v_dim`` (dv).

In the decode phase every sequence has exactly one row (``n == b``), and ``q_indptr`` is ``0, 1, ... b``.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import TensorType

from llmc.dialect.attention import reference as attention_reference
from llmc.dialect.core import call, register
from llmc.dialect.kv_codes import dequantize, quantize
from llmc.kv_layout import page_layout, scheme_attr

APPEND = "llmc.append"
ATTEND = "llmc.attend"


def append(
    k: relax.Expr, v: relax.Expr, slot_mapping: relax.Expr, kv_pages: relax.Expr, page_size: int, kv_scheme: str = ""
) -> relax.Call:
    return call(APPEND, k, v, slot_mapping, kv_pages, page_size=int(page_size), **scheme_attr(kv_scheme))


def attend(
    q: relax.Expr,
    kv_pages: relax.Expr,
    block_table: relax.Expr,
    seq_lens: relax.Expr,
    q_indptr: relax.Expr,
    sinks: relax.Expr | None = None,
    *,
    scale: float,
    page_size: int,
    v_dim: int,
    window: int = -1,
    chunk: int = -1,
    softcap: float = 0.0,
    kv_scheme: str = "",
) -> relax.Call:
    args = [q, kv_pages, block_table, seq_lens, q_indptr, *([] if sinks is None else [sinks])]
    return call(
        ATTEND, *args, scale=float(scale), window=int(window), chunk=int(chunk), softcap=float(softcap),
        sinks=int(sinks is not None), page_size=int(page_size), v_dim=int(v_dim),
        **scheme_attr(kv_scheme),
    )  # fmt: skip


def _infer_attend(c: relax.Call, _: relax.BlockBuilder) -> TensorType:
    q = c.args[0].ty
    return TensorType([q.shape[0], q.shape[1], int(c.attrs["v_dim"])], q.dtype)


register(APPEND, lambda c, _: c.args[3].ty)
register(ATTEND, _infer_attend)


def append_reference(
    k: np.ndarray, v: np.ndarray, slot_mapping: np.ndarray, kv_pages: np.ndarray, *, page_size: int, kv_scheme: str = ""
) -> np.ndarray:
    """A copy of ``kv_pages`` with the rows of k and v written to their slots (cast to the pages' dtype, or quantized)."""
    pages = kv_pages.copy()
    layout = page_layout(kv_scheme or "float32", page_size, k.shape[2], v.shape[2])
    pieces = [(0, k), (layout.values, v)]
    if layout.scheme is not None:
        (k_codes, k_parameters), (v_codes, v_parameters) = quantize(k, layout.scheme), quantize(v, layout.scheme)
        pieces = [(0, k_codes), (layout.values, v_codes)]
        pieces += [(layout.key_parameters, k_parameters), (layout.value_parameters, v_parameters)]
    for i, slot in enumerate(slot_mapping):
        if slot < 0:
            continue
        page, offset = divmod(int(slot), page_size)
        for base, rows in pieces:
            start = base + offset * rows.shape[2]
            pages[page, :, start : start + rows.shape[2]] = rows[i].astype(pages.dtype)
    return pages


def gather_reference(
    kv_pages: np.ndarray, table: np.ndarray, length: int, *, d: int, v_dim: int, page_size: int, kv_scheme: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``[length, hk, d]`` and values ``[length, hk, dv]`` of one sequence, read through its row of the block table."""
    layout = page_layout(kv_scheme or "float32", page_size, d, v_dim)
    positions = np.arange(length)
    pages, slots = kv_pages[table[positions // page_size]], positions % page_size

    def rows(base: int, width: int) -> np.ndarray:
        columns = base + slots[:, None] * width + np.arange(width)
        return np.take_along_axis(pages, columns[:, None, :], axis=2)

    k, v = rows(0, layout.key_width), rows(layout.values, layout.value_width)
    if layout.scheme is None:
        return k.astype(np.float64), v.astype(np.float64)
    scheme = layout.scheme
    k_parameters = rows(layout.key_parameters, 2 * scheme.parameters(d))
    v_parameters = rows(layout.value_parameters, 2 * scheme.parameters(v_dim))
    return dequantize(k, k_parameters, d, scheme), dequantize(v, v_parameters, v_dim, scheme)


def attend_reference(
    q: np.ndarray,
    kv_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    q_indptr: np.ndarray,
    sinks: np.ndarray | None = None,
    *,
    scale: float,
    page_size: int,
    v_dim: int,
    window: int = -1,
    chunk: int = -1,
    softcap: float = 0.0,
    kv_scheme: str = "",
) -> np.ndarray:
    """float64 reference of ``llmc.attend``: gather each sequence, then :func:`llmc.dialect.attention.reference`."""
    out = np.zeros((q.shape[0], q.shape[1], v_dim))
    for s, length in enumerate(int(n) for n in seq_lens):
        rows = slice(int(q_indptr[s]), int(q_indptr[s + 1]))
        count = rows.stop - rows.start
        if count == 0:
            continue
        k, v = gather_reference(
            kv_pages, block_table[s], length, d=q.shape[2], v_dim=v_dim, page_size=page_size, kv_scheme=kv_scheme
        )
        out[rows] = attention_reference(
            q[rows], k, v, sinks, scale=scale, window=window, chunk=chunk, softcap=softcap, first_row=length - count
        )
    return out
