"""``llmc.attention`` over one sequence -> append to pages, attend over pages, for any ragged mix of sequences.

before::                                       after::

    a = llmc.attention(q, k, v, layer=3)           p = llmc.append(k, v, slot_mapping, kv_pages.3)
                                                   a = llmc.attend(q, p, block_table, seq_lens, q_indptr)

The state tensors become parameters (see :mod:`llmc.manifest` for the order and :mod:`llmc.dialect.paged` for the meaning). The
append's result is what the attend reads, which keeps the two in order although the pages are written in place. Layers whose
keys and values are another layer's share that layer's pages. ``kv_dtype`` is a float dtype, or the name of a scheme whose codes the
pages then hold (:mod:`llmc.kv_layout`).
"""

from __future__ import annotations

from tvm import relax, tirx
from tvm.relax import TensorType

from llmc.dialect.core import attrs_of
from llmc.dialect.paged import append, attend
from llmc.kv_layout import SCHEMES, page_layout
from llmc.manifest import KvLayer
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import dims

STATE = ("slot_mapping", "q_indptr", "seq_lens", "block_table")


class _Paged:
    def __init__(self, graph: Graph, page_size: int, kv_dtype: str) -> None:
        n = graph.params[0].ty.shape[0]
        b, m = tirx.Var("b", "int64"), tirx.Var("m", "int64")
        self.num_pages = tirx.Var("num_pages", "int64")
        shapes = {"slot_mapping": [n], "q_indptr": [b + 1], "seq_lens": [b], "block_table": [b, m]}
        self.state = {name: relax.Var(name, TensorType(shapes[name], "int32")) for name in STATE}
        self.page_size, self.kv_dtype = page_size, kv_dtype
        self.kv_scheme = kv_dtype if kv_dtype in SCHEMES else ""
        self.pages: list[relax.Var] = []
        self.layers: list[KvLayer] = []
        self.written: dict[tuple[relax.Var, relax.Var], tuple[relax.Var, int]] = {}

    def rule(self, work: Rewriter, _: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) != "llmc.attention":
            return None
        q, k, v, *sinks = value.args
        attrs = attrs_of(value)
        window = attrs["window"]
        if (k, v) not in self.written:
            self.written[k, v] = self._append(work, k, v, window), len(self.layers) - 1
        pages, index = self.written[k, v]
        layer = self.layers[index]
        layer.window = -1 if -1 in (layer.window, window) else max(layer.window, window)
        return attend(
            q, pages, self.state["block_table"], self.state["seq_lens"], self.state["q_indptr"], *sinks,
            scale=attrs["scale"], page_size=self.page_size, v_dim=layer.v_dim,
            window=window, chunk=attrs["chunk"], softcap=attrs["softcap"], kv_scheme=self.kv_scheme,
        )  # fmt: skip

    def _append(self, work: Rewriter, k: relax.Var, v: relax.Var, window: int) -> relax.Var:
        _, heads, k_dim = dims(k)
        v_dim = dims(v)[2]
        layout = page_layout(self.kv_dtype, self.page_size, k_dim, v_dim)
        held = relax.Var(f"kv_pages.{len(self.pages)}", TensorType([self.num_pages, heads, layout.width], layout.dtype))
        self.pages.append(held)
        self.layers.append(KvLayer(heads, k_dim, v_dim, window))
        return work.emit(append(k, v, self.state["slot_mapping"], held, self.page_size, self.kv_scheme))


def paged_attention(graph: Graph, page_size: int, kv_dtype: str) -> list[KvLayer]:
    """Lower the attention of ``graph`` (inputs ``input_ids``, ``positions``); the layers of the KV cache in parameter order."""
    lowering = _Paged(graph, page_size, kv_dtype)
    rewrite(graph, lowering.rule)
    state = [lowering.state[name] for name in STATE]
    graph.params[graph.inputs : graph.inputs] = [*state, *lowering.pages]
    graph.inputs += len(state) + len(lowering.pages)
    return lowering.layers
