"""Rotation and append become part of decode attention, where the target has a kernel and nothing else reads the queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import relax, tirx
from tvm.relax import TensorType

from llmc.dialect import interpreter
from llmc.dialect.paged import attend
from llmc.dialect.rope_append import rope_append
from llmc.importer.params import ParamTable
from llmc.passes.fuse_attend import fuse_attend
from llmc.passes.rewrite import Graph, Rewriter
from llmc.passes.verify_dialect import Verifier
from tests.support.pipelines import EVEN, OPTIONS, count, phases_after

PAGE, HEADS, D = 4, 4, 6


def _layers(again: str = "") -> Graph:
    """Two layers on the same pages, of which the second has queries of its own, or (``again``) those of the first."""
    b, m, pages = tirx.Var("b", "int64"), tirx.Var("m", "int64"), tirx.Var("num_pages", "int64")
    shapes: dict[str, tuple[list[Any], str]] = {
        "qkv": ([b, HEADS * D + 2 * 2 * D], "float32"), "cos": ([b, 4], "float32"), "sin": ([b, 4], "float32"),
        "slot_mapping": ([b], "int32"), "q_indptr": ([b + 1], "int32"), "seq_lens": ([b], "int32"),
        "block_table": ([b, m], "int32"),
        "kv_pages.0": ([pages, 2, PAGE * 2 * D], "float32"), "other": ([b, HEADS, D], "float32"),
    }  # fmt: skip
    params = {name: relax.Var(name, TensorType(shape, dtype)) for name, (shape, dtype) in shapes.items()}
    graph = Graph("decode", list(params.values()), [], params["qkv"], len(params))
    work = Rewriter(graph)
    operands = (params[name] for name in ("qkv", "cos", "sin", "slot_mapping", "kv_pages.0"))
    both = work.emit(rope_append(*operands, heads=HEADS, v_dim=D, page_size=PAGE, rotary_dim=4))
    q, held = work.emit(relax.TupleGetItem(both, 0)), work.emit(relax.TupleGetItem(both, 1))
    state = [params[n] for n in ("block_table", "seq_lens", "q_indptr")]
    first = work.emit(attend(q, held, *state, scale=0.5, page_size=PAGE, v_dim=D, window=5))
    second = work.emit(attend(q if again else params["other"], held, *state, scale=0.5, page_size=PAGE, v_dim=D))
    graph.bindings, graph.output = work.bindings, work.emit(relax.op.add(first, second))
    return graph


def _run(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    lens = np.array([7, 1, 4])
    table = rng.permutation(7)[:6].reshape(3, 2)
    slots = table[np.arange(3), (lens - 1) // PAGE] * PAGE + (lens - 1) % PAGE
    given = {"slot_mapping": slots, "q_indptr": np.arange(4), "seq_lens": lens, "block_table": table}
    sizes = {"b": 3, "num_pages": 7}
    for p in graph.params:
        shape = [sizes[d.name] if isinstance(d, tirx.Var) else int(d) for d in p.ty.shape] if p.name not in given else []
        given.setdefault(p.name, rng.standard_normal(shape) if shape else None)
    machine = interpreter.Interpreter(graph.function())
    return machine.run([given[p.name] for p in graph.params]), machine.pages["kv_pages.0"]


def test_a_later_layer_reads_the_pages_of_the_fused_operator() -> None:
    plain, graph = _layers(), _layers()
    fuse_attend(graph, lambda *_: True)
    found = count(graph)
    assert (found["llmc.rope_attend"], found["llmc.attend"], found["llmc.rope_append"]) == (1, 1, 0)
    Verifier(ParamTable()).graph("fuse_attend", graph)
    for a, b in zip(_run(graph), _run(plain), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("again", "takes"), [("queries", True), ("", False)])
def test_what_is_left_alone(again: str, takes: bool) -> None:
    graph = _layers(again)
    fuse_attend(graph, lambda *_: takes)
    assert not count(graph)["llmc.rope_attend"]


def test_a_models_decode_phase(tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir("llama", **EVEN)
    found = phases_after("fuse_attend", folder)
    fused = {"llmc.rope_attend": 2, "llmc.rope_append": 0, "llmc.attend": 0}
    apart = {"llmc.rope_attend": 0, "llmc.rope_append": 2, "llmc.attend": 2}
    assert {op: found["decode"][op] for op in fused} == fused
    assert {op: found["extend"][op] for op in apart} == apart
    others = [
        phases_after("fuse_attend", folder, replace(OPTIONS, unfused=frozenset({"attend"}))),
        phases_after("fuse_attend", folder, replace(OPTIONS, kv_dtype="int8")),
        phases_after("fuse_attend", folder, target="cuda:sm_80"),
    ]
    for plain in others:
        assert {op: plain["decode"][op] for op in apart} == apart
