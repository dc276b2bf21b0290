"""One artifact for several targets: shared weights, and the variant that a machine gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc import manifest, targets
from llmc.errors import UsageError
from llmc.importer.params import Constant, ParamTable
from llmc.passes.quantize.options import QuantOptions
from llmc.runtime.artifact import choose_variant
from llmc.runtime.device import CudaDevice
from llmc.runtime.host import host
from llmc.settings import Settings, limits_of
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


def test_one_artifact_for_a_cpu_and_two_gpu_architectures(llama_for_three: Path, llama_artifact: Path) -> None:
    both, alone = manifest.read(llama_for_three), manifest.read(llama_artifact)
    variants = {v.target: v for v in both.variants}
    assert list(variants) == ["cpu:x86-64-v3", "cuda:sm_80", "cuda:sm_90a"]
    assert all((llama_for_three / v.library).is_file() for v in variants.values())
    # the same inputs give the same bytes, whatever else is compiled
    library = alone.variants[0].library
    assert both.files[library] == alone.files[library]
    # the matrices, which are all but a few kilobytes, are there once
    matrices = [name for name, t in both.tensors.items() if len(t.shape) == 2]
    assert sorted(matrices) == sorted(name for name, t in alone.tensors.items() if len(t.shape) == 2)
    assert variants["cuda:sm_80"].weights == variants["cuda:sm_90a"].weights

    def chosen(*gpus: CudaDevice) -> str:
        return choose_variant(both, llama_for_three, host(), gpus)[0].target

    assert chosen().startswith("cpu")
    assert chosen(CudaDevice(0, "A", (9, 0), 132, 1 << 36)) == "cuda:sm_90a"
    assert chosen(CudaDevice(0, "B", (8, 6), 84, 1 << 34)) == "cuda:sm_80"
    assert chosen(CudaDevice(0, "C", (7, 5), 40, 1 << 34)).startswith("cpu")
    prompt = list(range(1, 12))
    with llmc.load(llama_for_three) as first, llmc.load(llama_artifact) as second:
        assert first.generate(prompt, max_tokens=8).token_ids == second.generate(prompt, max_tokens=8).token_ids


def test_the_target_that_can_do_least_decides_on_the_rows_of_a_step() -> None:
    settings = Settings("bfloat16", "bfloat16", QuantOptions(None), context=16384, max_batch=4, page_size=16)

    def rows(*specs: str, context: int = 16384) -> int:
        return limits_of(replace(settings, context=context), [targets.parse(spec) for spec in specs]).max_rows

    assert (rows("cuda:sm_90a"), rows("cuda:sm_80"), rows("cpu:x86-64-v3")) == (8192, 4096, 512)
    assert (rows("cuda:sm_90a", "cuda:sm_80"), rows("cuda:sm_90a", "cpu:x86-64-v3")) == (4096, 512)
    assert rows("cuda:sm_90a", context=1000) == 4000
