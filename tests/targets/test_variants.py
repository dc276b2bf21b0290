"""One artifact for several targets: shared weights, and the variant that a machine gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc import targets
from llmc.compiler import compile as compile_model
from llmc.errors import UsageError
from llmc.importer.params import Constant, ParamTable
from llmc.runtime.artifact import choose_variant
from llmc.runtime.device import CudaDevice
from llmc.runtime.host import host
from llmc.variants import SharedWeights


def test_target_lists() -> None:
    assert [t.name for t in targets.parse_all("cuda:sm_80,sm_90a")] == ["cuda:sm_80", "cuda:sm_90a"]
    assert [t.name for t in targets.parse_all(["cpu:x86-64-v3", "cuda:sm_80", "cuda:sm_80"])] == ["cpu:x86-64-v3", "cuda:sm_80"]
    with pytest.raises(UsageError, match="no target was named"):
        targets.parse_all([])
    with pytest.raises(UsageError, match="sm_91"):
        targets.parse_all("cuda:sm_80,sm_91")


def test_a_weight_is_stored_once_unless_two_targets_store_it_differently() -> None:
    def table(dtype: str, *values: float) -> ParamTable:
        found = ParamTable()
        found.add("w", Constant(np.array(values, np.float32), f"constant {values}"), dtype)
        return found

    weights = SharedWeights()
    assert weights.share(["w"], table("float32", 1, 2)) == ["w"]
    assert weights.share(["w"], table("float32", 1, 2)) == ["w"]
    assert weights.share(["w"], table("float16", 1, 2)) == ["w@2"]
    assert weights.share(["w"], table("float32", 3, 4)) == ["w@3"]
    assert weights.share(["w"], table("float16", 1, 2)) == ["w@2"]
    assert list(weights.table) == ["w", "w@2", "w@3"]


def test_one_artifact_for_a_cpu_and_two_gpu_architectures(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = str(tiny_model_dir("llama"))
    options = {"dtype": "bfloat16", "context": 64}
    both = compile_model(model, out=tmp_path / "both", target=["cpu", "cuda:sm_80,sm_90a"], **options)
    alone = compile_model(model, out=tmp_path / "alone", target="cpu", **options)
    variants = {v.target: v for v in both.manifest.variants}
    assert list(variants)[1:] == ["cuda:sm_80", "cuda:sm_90a"] and len(variants) == 3
    assert all((tmp_path / "both" / v.library).is_file() for v in variants.values())
    # the matrices, which are all but a few kilobytes, are there once
    matrices = [name for name, t in both.manifest.tensors.items() if len(t.shape) == 2]
    assert sorted(matrices) == sorted(name for name, t in alone.manifest.tensors.items() if len(t.shape) == 2)
    assert variants["cuda:sm_80"].weights == variants["cuda:sm_90a"].weights

    def chosen(*gpus: CudaDevice) -> str:
        return choose_variant(both.manifest, both.out, host(), gpus)[0].target

    assert chosen().startswith("cpu")
    assert chosen(CudaDevice(0, "A", (9, 0), 132, 1 << 36)) == "cuda:sm_90a"
    assert chosen(CudaDevice(0, "B", (8, 6), 84, 1 << 34)) == "cuda:sm_80"
    assert chosen(CudaDevice(0, "C", (7, 5), 40, 1 << 34)).startswith("cpu")
    prompt = list(range(1, 12))
    with llmc.load(tmp_path / "both") as first, llmc.load(tmp_path / "alone") as second:
        assert first.generate(prompt, max_tokens=8).token_ids == second.generate(prompt, max_tokens=8).token_ids
