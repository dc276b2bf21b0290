"""A model's graphs in the middle of the pipeline."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from llmc import targets
from llmc.importer.model import import_model
from llmc.importer.resolve import resolve
from llmc.passes import pipeline
from llmc.passes.pipeline import Options
from llmc.passes.rewrite import Graph, op_name

OPTIONS = Options(kv_dtype="bfloat16", context=32, max_batch=4, max_rows=16, max_logit_rows=8, unfused=frozenset())
EVEN = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Sizes of a tiny model that CUDA's kernels take."""


def count(graph: Graph) -> Counter[str]:
    """How often each operator is in a graph."""
    return Counter(op_name(value) for _, value in graph.bindings)


def phases_after(name: str, folder: Path, options: Options = OPTIONS, target: str = "cuda:sm_90a") -> dict[str, Counter[str]]:
    """The operators of both phases of the bfloat16 model in ``folder`` behind the pipeline's step ``name``."""
    imported = import_model(resolve(str(folder)), storage_dtype="bfloat16", compute_dtype="bfloat16", context=32)
    graph = Graph.of("main", imported.mod["main"])
    graph.remove_unused_params(imported.params)
    plan = pipeline.Plan(options.quantization)
    state = pipeline._State([graph], imported.params, targets.parse(target), options, plan)
    for step, run in pipeline.PASSES:
        run(state)
        if step == name:
            break
    return {g.name: count(g) for g in state.graphs}
