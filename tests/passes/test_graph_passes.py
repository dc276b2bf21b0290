"""Every graph pass keeps the meaning of every case, and does what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from llmc.dialect import interpreter
from llmc.manifest import KvLayer
from llmc.passes.fuse_append import fuse_append
from llmc.passes.fuse_attend import fuse_attend
from llmc.passes.fuse_epilogue import fuse_bias, fuse_epilogue
from llmc.passes.fuse_norm import fuse_norm
from llmc.passes.fuse_rope import fuse_rope
from llmc.passes.merge_projections import merge_projections
from llmc.passes.paged_attention import paged_attention
from llmc.passes.phases import phases
from llmc.passes.quantize.options import QuantOptions
from llmc.passes.quantize.plan import Plan, assign
from llmc.passes.quantize.quantize_weights import quantize_weights
from llmc.passes.rewrite import Graph, op_name
from llmc.passes.simplify import simplify
from llmc.passes.sink_permutes import sink_permutes
from llmc.passes.verify_dialect import Verifier
from llmc.targets import parse
from tests.support import graphs
from tests.support.stepper import Stepper, mixed_schedule, page_shapes

Pass = Callable[[Graph, graphs.Built], None]

STEPS: list[tuple[str, Pass]] = [
    ("simplify", lambda g, b: simplify(g, b.table)),
    ("fuse_norm", lambda g, b: fuse_norm(g, b.table)),
    ("fuse_rope", lambda g, b: fuse_rope(g)),
    ("sink_permutes", lambda g, b: sink_permutes(g)),
    ("simplify_layouts", lambda g, b: simplify(g, b.table)),
    ("fuse_bias", lambda g, b: fuse_bias(g)),
    ("merge_projections", lambda g, b: merge_projections(g, b.table)),
    ("fuse_epilogue", lambda g, b: fuse_epilogue(g)),
    ("simplify_slices", lambda g, b: simplify(g, b.table)),
]


def optimised(built: graphs.Built) -> Graph:
    graph = Graph.of("main", built.module["main"])
    for _, run in STEPS:
        run(graph, built)
    return graph


def count(graph: Graph) -> Counter[str]:
    return Counter(op_name(value) for _, value in graph.bindings)


@pytest.mark.parametrize("case", graphs.CASES)
def test_each_pass_keeps_the_result(case: str) -> None:
    built = graphs.build(graphs.CASES[case])
    given = built.inputs(6)
    expected = interpreter.run(built.module, built.arguments(built.module["main"].params, given))
    graph = Graph.of("main", built.module["main"])
    verifier = Verifier(built.table)
    for name, run in STEPS:
        run(graph, built)
        verifier.graph(name, graph)
        found = interpreter.run(graph.module(), built.arguments(graph.params, given))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=f"after {name}")


@pytest.mark.parametrize("case", graphs.CASES)
def test_everything_is_recognised(case: str) -> None:
    built = graphs.build(graphs.CASES[case])
    c = built.config
    found = count(optimised(built))
    per_layer = 2 + 2 * c.qk_norm + 2 * c.sandwich
    norm = "llmc.layer_norm" if c.norm == "layer" else "llmc.rms_norm"
    assert found[norm] == c.layers * per_layer + 1
    assert found["llmc.rope"] == (0 if c.rope == "none" else 2 * c.layers)
    feed_forward = 1 if c.experts else 2  # the router, or up (with its gate) and down
    assert found["llmc.linear"] == c.layers * (2 + feed_forward) + 1
    primitive = ("relax.permute_dims", "relax.rsqrt", "relax.mean", "relax.power", "relax.negative", "relax.split")
    assert not any(found[name] for name in primitive)
    assert found["relax.cos"] == (c.rope != "none")
    if not c.sandwich:  # with a norm behind each block, the residual is not the linear layer's
        assert found["relax.add"] == (c.learned_positions > 0) + c.layers * (c.experts > 0)


def test_merged_weights_stand_below_each_other() -> None:
    built = graphs.build(graphs.CASES["grouped"])
    parts = [graphs.stored(built.table, f"layers.0.attn.{s}_proj.weight") for s in "qkv"]
    optimised(built)
    merged = graphs.stored(built.table, "layers.0.attn.q_proj+k_proj+v_proj.weight")
    np.testing.assert_array_equal(merged, np.concatenate(parts))
    assert "layers.0.attn.q_proj.weight" not in built.table


def _paged_phases(case: str, quant: str = "none") -> tuple[graphs.Built, list[KvLayer], dict[str, Graph]]:
    built = graphs.build(graphs.CASES[case])
    graph = optimised(built)
    plan = Plan(QuantOptions(quant))
    assign(graph, built.table, plan, parse("cpu"))
    quantize_weights(graph, built.table, plan, parse("cpu"))
    layers = paged_attention(graph, 4, "float32")
    return built, layers, {g.name: g for g in phases(graph)}


@pytest.mark.parametrize("fused", ["nothing", "append", "attend"])
@pytest.mark.parametrize("case", graphs.CASES)
def test_phases_agree_with_one_forward_pass(case: str, fused: str) -> None:
    built, layers, by_name = _paged_phases(case)
    verifier = Verifier(built.table)
    for graph in by_name.values():
        verifier.graph("phases", graph)
        if fused != "nothing":
            fuse_append(graph)
            verifier.graph("fuse_append", graph)
            found, rotated = count(graph), built.config.rope != "none"
            assert found["llmc.rope_append"] == rotated * built.config.layers
            assert found["llmc.append"] == (not rotated) * built.config.layers
            assert found["llmc.rope"] == 0
    if fused == "attend":
        graph = by_name["decode"]
        fuse_attend(graph, lambda *_: True)
        verifier.graph("fuse_attend", graph)
        found, rotated = count(graph), built.config.rope != "none"
        assert found["llmc.rope_attend"] == rotated * built.config.layers and not found["llmc.rope_append"]
        assert found["llmc.attend"] == (not rotated) * built.config.layers
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, built.config.vocab, n) for n in (11, 7, 5)]
    pages = {f"kv_pages.{i}": np.zeros(shape) for i, shape in enumerate(page_shapes(layers, 12, 4))}

    def run(phase: str, state: dict[str, np.ndarray], rows: int) -> np.ndarray:
        graph = by_name[phase]
        machine = interpreter.Interpreter(graph.function())
        result = machine.run(built.arguments(graph.params, {**state, **pages}))
        pages.update(machine.pages)
        assert result.shape == (rows, built.config.vocab)
        return result

    stepper = Stepper(run, sequences, page_size=4, num_pages=12)
    mixed_schedule(stepper)
    original = graphs.build(graphs.CASES[case])
    for ids, logits in zip(sequences, stepper.logits, strict=True):
        assert logits
        given = {"input_ids": ids, "positions": np.arange(len(ids))}
        expected = interpreter.run(original.module, original.arguments(original.module["main"].params, given))
        for position, row in logits.items():
            np.testing.assert_allclose(row, expected[position], rtol=1e-9, atol=1e-9, err_msg=f"position {position}")


@pytest.mark.parametrize(("quant", "linear"), [("none", "llmc.linear"), ("int8_g32", "llmc.quantized_linear")])
def test_extend_computes_only_wanted_rows_from_the_last_queries_on(quant: str, linear: str) -> None:
    _, _, by_name = _paged_phases("grouped", quant)
    rows = {op: [str(v.ty.shape[0]) for v, e in by_name["extend"].bindings if op_name(e) == op] for op in (linear, "llmc.attend")}
    assert rows["llmc.attend"] == ["n", "r"]
    # layer 0: qkv, o, gate+up, down; layer 1: qkv for all rows, then o, gate+up, down and the vocabulary for the wanted ones
    assert rows[linear] == ["n"] * 5 + ["r"] * 4
    assert [p.name for p in by_name["extend"].params[:9]] == [
        "input_ids", "positions", "slot_mapping", "q_indptr", "seq_lens", "block_table", "logit_rows", "kv_pages.0", "kv_pages.1",
    ]  # fmt: skip


def test_windows_of_the_layers_are_recorded() -> None:
    _, layers, _ = _paged_phases("offset_norms")
    assert [layer.window for layer in layers] == [5, -1]
    assert [(layer.heads, layer.k_dim, layer.v_dim) for layer in layers] == [(2, 6, 6)] * 2
