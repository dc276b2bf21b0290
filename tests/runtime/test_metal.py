"""The executor for Apple GPUs, on this machine's processor in place of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.errors import MissingExtraError
from llmc.runtime import library, load
from llmc.runtime.artifact import open_artifact
from llmc.runtime.executor import TvmExecutor
from llmc.runtime.gpu.metal import MetalExecutor
from llmc.runtime.library import load_metal_runtime, load_runtime
from llmc.runtime.model import Model
from llmc.runtime.vm import DL_CPU


class OnProcessor(MetalExecutor):
    """Memory, copies and calls as on a Mac, of the device that TVM calls the CPU."""

    device_name, device_type = "cpu", DL_CPU

    def load_runtime(self, artifact: Any) -> Any:
        return load_runtime(artifact.folder)


PROMPTS = [[1, 2, 3], [4] * 11, [5], [10, 9, 8, 7, 6]]


def test_a_model_says_what_the_processors_executor_makes_it_say(artifact: Path) -> None:
    opened = open_artifact(artifact)
    with load(artifact, max_batch=3) as host, Model(opened.manifest, OnProcessor(opened, 12), artifact, max_batch=3) as device:
        for options in ({"max_tokens": 9}, {"max_tokens": 8, "temperature": 0.9, "seed": 3}):
            expected = [c.token_ids for c in host.generate(PROMPTS, n=2, **options)]
            assert [c.token_ids for c in device.generate(PROMPTS, n=2, **options)] == expected
        np.testing.assert_array_equal(device.logits(PROMPTS[1]), host.logits(PROMPTS[1]))


def test_pages_are_copied_over_all_layers(artifact: Path) -> None:
    opened = open_artifact(artifact)
    device, host = OnProcessor(opened, 4), TvmExecutor(opened, 4)
    rng = np.random.default_rng(0)
    for theirs, mine in zip(device._pages, host._pages, strict=True):
        mine[...] = rng.integers(0, 100, mine.shape)
        device._fill(theirs, mine)
    for executor in (device, host):
        executor.copy_page(3, 1)
        executor.clear_page(2)
    for theirs, mine in zip(device._pages, host._pages, strict=True):
        np.testing.assert_array_equal(np.from_dlpack(theirs), mine)
        assert mine[[0, 1, 3]].all(axis=(1, 2)).any()
        assert not mine[2].any()


def test_without_tvms_metal_runtime_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed_library", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs libtvm_runtime_metal.*: run `pip install apache-tvm==0.27.0.post1`"):
        load_metal_runtime()
