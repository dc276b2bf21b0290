"""The real model, end to end: SmolLM2-135M from its GGUF, compiled in float32, against transformers on the same weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived an old",
    "Q: What is 12 + 30?\nA:",
)


@pytest.fixture(scope="module")
def model(smollm2_artifact: Path) -> Iterator[Any]:
    with llmc.load(smollm2_artifact) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32).eval()


def test_greedy_equals_transformers_for_64_tokens(model: Any, reference: Any) -> None:
    """Every token is the one that transformers finds likeliest behind those before it: one pass of it for each prompt."""
    import torch

    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        found = model.generate(ids, max_tokens=64, ignore_eos=True).token_ids
        with torch.no_grad():
            logits = reference(torch.tensor([ids + found])).logits[0]
        assert len(found) == 64 and found == logits[len(ids) - 1 : -1].argmax(-1).tolist(), prompt


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(model: Any) -> None:
    alone = [model.generate(p, max_tokens=24, temperature=0.8, top_p=0.95, seed=7) for p in PROMPTS]
    together = model.generate(list(PROMPTS), max_tokens=24, temperature=0.8, top_p=0.95, seed=7)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_logits_are_transformers_logits(model: Any, reference: Any) -> None:
    import torch

    ids = model.tokenizer.encode(PROMPTS[2] * 20)  # longer than one chunk of logit rows
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    found = model.logits(ids)
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.995


def test_score_is_the_sum_of_log_probabilities(model: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    score = model.score(text)
    ids = model.tokenizer.encode(text)
    logits = model.logits(ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logprobs[i, ids[i + 1]] for i in range(len(ids) - 1))
    assert score.total == pytest.approx(expected, rel=1e-4)


def test_a_chat_answer_is_sensible(model: Any) -> None:
    answer = model.generate([{"role": "user", "content": "What is the capital of France?"}], max_tokens=40)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


THIN = """
import sys, resource, json, os
import llmc
m = llmc.load({artifact!r})
first = next(iter(m.generate("The capital of France is", max_tokens=4, stream=True)))
status = {{k: int(v.split()[0]) for k, v in (l.split(":", 1) for l in open("/proc/self/status") if l.startswith(("Rss", "VmRSS")))}}
heavy = [n for n in ("tvm", "torch", "transformers") if sys.modules.get(n) is not None]
print(json.dumps({{"heavy": heavy, "anonymous": status["RssAnon"], "rss": status["VmRSS"], "text": first.text}}))
"""


def test_running_needs_no_compiler_and_little_memory(smollm2_artifact: Path) -> None:
    """In a process of its own: no tvm, torch or transformers, and under 90 MB beside the weights."""
    import json

    code = THIN.format(artifact=str(smollm2_artifact))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    weights = sum(f.stat().st_size for f in (smollm2_artifact / "weights").iterdir())
    assert found["heavy"] == []
    assert found["rss"] * 1024 - weights < 90e6, found


def test_the_artifact_moves(smollm2_artifact: Path, tmp_path: Path) -> None:
    """Relocatable: a hard-linked copy elsewhere runs, and no path of the place it was built in is inside."""
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(smollm2_artifact, moved, copy_function=os.link)
    with llmc.load(moved) as model:
        assert model.generate("The capital of France is", max_tokens=2).text.strip().startswith("Paris")
    text = (moved / "manifest.json").read_text()
    assert not re.search(re.escape(str(smollm2_artifact)), text)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "bits", "share"), [("int8", 8.25, 0.005), ("fp8_e4m3", 8.25, 0.01), ("int4", 5.0, 0.05)])
def test_quantized_kv_cache(model: Any, smollm2_gguf: Path, tmp_path: Path, kv_dtype: str, bits: float, share: float) -> None:
    """A text is as likely as with float32 pages but for ``share`` of the mean negative logarithm, at the scheme's bits."""
    from llmc.compiler import compile as compile_model
    from llmc.texts import EVALUATION, read_text

    compile_model(str(smollm2_gguf), out=tmp_path / "artifact", dtype="float32", kv_dtype=kv_dtype, context=1024)
    text = read_text(EVALUATION)[:3000]
    with llmc.load(tmp_path / "artifact") as quantized:
        kv, floats = quantized.manifest.kv, model.manifest.kv
        assert kv.bits == bits and kv.bytes_per_token * 32 == floats.bytes_per_token * bits
        expected, found = model.score(text).total, quantized.score(text).total
        assert abs(found - expected) < share * abs(expected)
        if kv_dtype == "int8":
            assert "Paris" in quantized.generate("The capital of France is", max_tokens=8).text
