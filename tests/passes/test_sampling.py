"""A module for a GPU chooses tokens and steps on by itself; one for a CPU leaves that to the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import targets
from llmc.importer.model import import_model
from llmc.importer.resolve import resolve
from llmc.passes.pipeline import Lowered, Options, lower

OPTIONS = Options(page_size=16, kv_dtype="bfloat16", context=64, max_batch=3, max_rows=32, max_logit_rows=8)


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama")


def lowered(folder: Path, target: str) -> Lowered:
    chosen = targets.parse(target)
    dtype = targets.module_for(chosen).compute_dtype("bfloat16")
    imported = import_model(resolve(str(folder)), storage_dtype="bfloat16", compute_dtype=dtype, context=64)
    return lower(imported.mod, imported.params, chosen, OPTIONS)


def test_a_gpu_module_has_functions_that_choose_and_step(folder: Path) -> None:
    found = lowered(folder, "cuda:sm_80")
    assert [f.name for f in found.functions] == ["decode", "extend", "sample", "advance"]
    sample, advance = found.functions[2:]
    # one row of statistics of four numbers for each draw, and nothing that depends on a batch beyond the limit
    assert sample.storages == [3 * 4 * 4] and sample.workspace_bytes == 48 and advance.storages == []
    assert (sample.kernels, advance.kernels) == (2, 1)
    chosen = {(k.function, k.op): k.family for k in found.kernels}
    assert chosen["sample", "llmc.sample_stats"] == "cuda.sample_stats"
    assert chosen["sample", "llmc.sample"] == "cuda.sample"
    assert chosen["advance", "llmc.advance"] == "cuda.advance"
    names = {var.name_hint: f for var, f in found.mod.functions.items()}
    assert {"sample", "advance"} <= set(names)


def test_a_cpu_module_leaves_sampling_to_the_host(folder: Path) -> None:
    assert [f.name for f in lowered(folder, "cpu:x86-64-v3").functions] == ["decode", "extend"]
