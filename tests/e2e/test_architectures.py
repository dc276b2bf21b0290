"""Every family through the whole compiler: the artifact's logits and greedy tokens are those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmc
from llmc.compiler import compile as compile_model
from llmc.manifest import KvInfo
from tests.support.tiny_models import MODELS, VOCAB


def check(folder: Path, artifact: Path, *, tolerance: float, greedy: bool = True) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [int(i) for i in np.random.default_rng(3).integers(0, VOCAB, 37)]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        following = reference.generate(torch.tensor([ids[:11]]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    with llmc.load(artifact) as model:
        found = model.logits(ids)
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
        # Decoding goes through pages, and 24 tokens after 11 cross every window and several pages.
        generated = model.generate(ids[:11], max_tokens=24, ignore_eos=True).token_ids
    if greedy:
        assert generated == following[0, 11:].tolist()


OWN_WAYS = {"cohere", "deepseek_v3", "gemma2", "gpt2", "gpt_oss", "llama4_text", "phi3", "qwen3_moe"}
"""Families that between them go through every operator and kernel, beside the llama of the last test. The others differ in what the
importer makes of them, which ``tests/importer/test_architectures.py`` compares for all: here they are slow tests."""


@pytest.mark.parametrize(
    "model_type", [name if name in OWN_WAYS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MODELS)]
)
def test_logits_and_greedy_tokens(model_type: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model_dir(model_type)
    compile_model(str(folder), out=tmp_path / "out", dtype="float32", page_size=4)
    check(folder, tmp_path / "out", tolerance=2e-5)


# Slow: float16 goes the way of bfloat16, and tests/kernels/test_cpu_families.py has kernels of both.
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_narrow_storage(dtype: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Weights and KV cache in two bytes, sums in float32: the error is that of rounding weights, not of summing."""
    folder = tiny_model_dir("qwen3")
    report = compile_model(str(folder), out=tmp_path / "out", dtype=dtype)
    assert report.manifest.kv.dtype == dtype
    check(folder, tmp_path / "out", tolerance=3e-2 if dtype == "bfloat16" else 4e-3, greedy=False)


# Slow: int4 goes the way of int8; tests/passes/test_end_to_end.py runs both through machine code.
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("int8", 3e-2), pytest.param("int4", 3e-1, marks=pytest.mark.slow)])
def test_quantized_kv_cache(kv_dtype: str, tolerance: float, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Logits near those of floats in fewer bytes; a sample that forks pages gives what it gives alone."""
    folder = tiny_model_dir("qwen3")
    kv = compile_model(str(folder), out=tmp_path / "out", dtype="float32", kv_dtype=kv_dtype, page_size=4).manifest.kv
    floats = KvInfo(kv.page_size, "float32", kv.layers)
    assert kv.page_bytes < floats.page_bytes / (3 if kv_dtype == "int8" else 4)
    check(folder, tmp_path / "out", tolerance=tolerance, greedy=False)
    with llmc.load(tmp_path / "out") as model:
        options = {"max_tokens": 9, "temperature": 1.0, "ignore_eos": True}
        together = model.generate(list(range(1, 7)), n=3, seed=5, **options)
        assert len({tuple(c.token_ids) for c in together}) > 1
        assert together[0].token_ids == model.generate(list(range(1, 7)), seed=5, **options).token_ids


def test_a_context_that_is_no_multiple_of_the_page(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """And two compiles of it give the same bytes."""
    folder = tiny_model_dir("llama")
    first, second = (
        compile_model(str(folder), out=tmp_path / name, dtype="float32", context=41, page_size=7, max_batch=3).manifest
        for name in ("out", "again")
    )
    assert first.files == second.files and first.graph_sha256 == second.graph_sha256
    check(folder, tmp_path / "out", tolerance=2e-5)
    with llmc.load(tmp_path / "out") as model:
        done = model.generate(list(range(1, 30)), max_tokens=100, ignore_eos=True)
        assert done.finish_reason == "length" and len(done.token_ids) == 41 - 29
