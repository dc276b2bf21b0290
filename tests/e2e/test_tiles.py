"""A whole model with AMX's tile registers, on two threads, beside the same model without: one artifact, one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc import manifest, targets
from llmc.compiler import compile as compile_model
from llmc.runtime import artifact
from llmc.runtime.host import host
from tests.support import amx

PLAIN, TILES = "cpu:x86-64-v3", "cpu:x86-64-v3+amx-bf16+amx-int8"
PROMPT = [3 + 5 * i % 90 for i in range(37)]


@pytest.mark.parametrize(
    ("options", "sizes", "products"),
    [
        # Kernels of quantized weights take long to compile: two are enough here.
        ({"quant": "int4_g32", "keep": ["self_attn=none", "lm_head=none"]}, {}, "byte products"),
        # Slow: the same way as the other; bfloat16 kernels are run by tests/kernels/test_cpu_tiles.py.
        pytest.param(
            {"dtype": "bfloat16"}, {"hidden_size": 96, "intermediate_size": 128}, "bfloat16 products", marks=pytest.mark.slow
        ),
    ],
    ids=["int4", "bfloat16"],
)
def test_a_model_with_tiles_answers_as_without(
    options: dict[str, Any],
    sizes: dict[str, int],
    products: str,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = targets.parse(TILES)
    if missing := amx.lacking(target):
        pytest.skip(f"this machine cannot run {target.name}, tiles aside: it lacks {missing}")
    compile_model(str(tiny_model_dir("llama", **sizes)), out=tmp_path / "model", target=[PLAIN, TILES], context=64, **options)
    m = manifest.read(tmp_path / "model")
    assert m.variants[0].weights == m.variants[1].weights
    assert any("AMX tiles" in kernel.why for kernel in m.variants[1].kernels)
    logits, tokens = [], []
    for features in (set(), amx.FEATURES):
        here = replace(host(), features=(host().features or frozenset()) - amx.FEATURES | features)
        monkeypatch.setattr(artifact, "host", lambda here=here: here)
        before = amx.counts()
        with llmc.load(tmp_path / "model", threads=min(2, len(host().cpus))) as model:
            assert artifact.open_artifact(tmp_path / "model").variant.target == (TILES if features else PLAIN)
            logits.append(model.logits(PROMPT).copy())
            tokens.append(model.generate(PROMPT, max_tokens=8).token_ids)
        after = amx.counts()
        assert (after[products] > before[products]) == bool(features) or (host().features or frozenset()) >= amx.FEATURES
        assert after["configurations"] == after["releases"]
    assert tokens[0] == tokens[1]
    if products == "byte products":
        np.testing.assert_array_equal(logits[0], logits[1])
    else:
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-5 * np.abs(logits[0]).max())
