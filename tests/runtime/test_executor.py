"""A compiled module runs through the executor as the ABI says, in this process and in one that has no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import ArtifactError, InternalError, RequestError
from llmc.runtime import library, load
from llmc.runtime.artifact import open_artifact
from llmc.runtime.batch import Chunk, build_step
from llmc.runtime.executor import TvmExecutor
from llmc.runtime.host import host
from llmc.runtime.pages import PageAllocator
from llmc.runtime.sequence import Sequence

from .module import CONTEXT, PAGE_SIZE, VOCAB, reference


def test_logits_of_one_sequence(artifact: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 29)]
    with load(artifact) as model:
        found = model.logits(ids)
        assert found.shape == (29, VOCAB)
        np.testing.assert_allclose(found, reference(ids), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.logits(ids[:1]), reference(ids[:1]), rtol=1e-5)
        assert model.pages.used == 0


def test_a_ragged_step_writes_and_reads_the_right_slots(artifact: Path) -> None:
    executor = TvmExecutor(open_artifact(artifact), 12, threads=1)
    allocator = PageAllocator(12, PAGE_SIZE)
    allocator.allocate(2)
    sequences = [Sequence(tokens, allocator) for tokens in ([1, 2, 3, 4, 5], [10, 9], [0, 0, 7, 3])]

    def run(*plan: tuple[int, int, int]) -> np.ndarray:
        chunks = [Chunk(sequences[s], rows, logits) for s, rows, logits in plan]
        for chunk in chunks:
            chunk.sequence.table.reserve(chunk.rows, executor.copy_page)
        out = executor.run(build_step(chunks)).copy()
        for chunk in chunks:
            chunk.sequence.table.advance(chunk.rows)
        return out

    want = [reference(s.tokens) for s in sequences]
    np.testing.assert_allclose(run((0, 3, 0), (1, 1, 1), (2, 4, 2)), [want[1][0], *want[2][2:]], rtol=1e-5)
    np.testing.assert_allclose(run((0, 1, 1), (1, 1, 1)), [want[0][3], want[1][1]], rtol=1e-5)
    twin = sequences[0].fork()
    twin.tokens[-1] = 8
    sequences.append(twin)
    np.testing.assert_allclose(run((3, 1, 1)), [reference([1, 2, 3, 4, 8])[4]], rtol=1e-5)
    np.testing.assert_allclose(run((0, 1, 1)), [want[0][4]], rtol=1e-5)
    # nothing wanted: still one row of logits, of the last row
    sequences[1].tokens += [4, 4]
    np.testing.assert_allclose(run((1, 2, 0)), [reference([10, 9, 4, 4])[3]], rtol=1e-5)
    executor.close()


def test_copied_pages_hold_the_same_in_every_layer(artifact: Path) -> None:
    executor = TvmExecutor(open_artifact(artifact), 4, threads=1)
    for layer, pages in enumerate(executor._pages):
        assert not pages.any()
        pages[1] = layer + 1
    executor.copy_page(1, 3)
    for layer, pages in enumerate(executor._pages):
        assert (pages[3] == layer + 1).all()
        assert not pages[0].any()
        assert not pages[2].any()


def test_generation_on_a_compiled_module(artifact: Path) -> None:
    model = load(artifact, max_batch=2)
    prompts = [[1, 2, 3], [4] * 20, [5]]
    for completion, prompt in zip(model.generate(prompts, max_tokens=6), prompts, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(reference(tokens)[-1].astype(np.float32).argmax()))
        assert completion.token_ids == tokens[len(prompt) :]
    a, b = model.generate([1, 2, 3], n=2, temperature=1.0, seed=1, max_tokens=8)
    assert a.token_ids != b.token_ids
    assert model.generate([1, 2, 3], temperature=1.0, seed=1, max_tokens=8).token_ids == a.token_ids
    full = model.generate([1] * (CONTEXT - 2), max_tokens=None)
    assert (len(full.token_ids), full.finish_reason) == (2, "length")


def test_load_options_are_checked(artifact: Path) -> None:
    cases = [
        ({"context": CONTEXT + 1}, r"context=33 cannot be: the artifact was compiled for 1 to 32"),
        ({"max_batch": 4}, r"max_batch=4 cannot be: the artifact was compiled for 1 to 3"),
        ({"threads": len(host().cpus) + 1}, r"this process may use 1 to"),
        ({"threads": 0}, r"threads=0"),
        ({"kv_memory": 10}, r"kv_memory=10 bytes holds no page of 4 tokens \(64 bytes\): a full context of 32 tokens takes 512"),
    ]
    for options, message in cases:
        with pytest.raises(RequestError, match=message):
            load(artifact, **options)
    assert load(artifact, kv_memory=200).pages.num_pages == 3
    assert load(artifact, context=16).pages.num_pages == 8
    assert load(artifact, context=16, max_batch=1).pages.num_pages == 4
    assert load(artifact, kv_memory=10**9).pages.num_pages == 24


def test_every_model_keeps_its_own_number_of_threads(artifact: Path) -> None:
    import tvm_ffi

    count = tvm_ffi.get_global_func("runtime.NumThreads")
    every = len(host().cpus)
    before = os.sched_getaffinity(0)
    one, all_of_them = load(artifact, threads=1), load(artifact, threads=every)
    for model, threads in ((one, 1), (all_of_them, every), (one, 1)):
        model.generate([1], max_tokens=1)
        assert count() == threads
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(one.generate, [1], max_tokens=1).result()
        assert elsewhere.submit(count).result() == 1
    assert os.sched_getaffinity(0) == before


def test_a_step_the_module_refuses_is_a_defect_told_in_one_line(artifact: Path) -> None:
    executor = TvmExecutor(open_artifact(artifact), 4)
    sequence = Sequence([1, 2], PageAllocator(4, PAGE_SIZE))
    sequence.table.reserve(2, executor.copy_page)
    step = build_step([Chunk(sequence, 2, 1)])
    with pytest.raises(InternalError, match="the compiled module failed") as caught:
        executor.run(replace(step, slot_mapping=step.slot_mapping[:1]))
    assert "\n" not in str(caught.value)


def test_a_damaged_module_is_one_sentence(artifact: Path) -> None:
    opened = open_artifact(artifact)
    (artifact / "broken.so").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(ArtifactError, match=r"broken\.so cannot be loaded .*recompile") as caught:
        TvmExecutor(replace(opened, variant=replace(opened.variant, library="broken.so")), 4)
    assert "\n" not in str(caught.value)


CHILD = """
import json, sys
import llmc.runtime
light = "numpy" not in sys.modules
model = llmc.runtime.load(sys.argv[1], threads=1)
tokens = model.generate([1, 2, 3], max_tokens=5, stop="x").token_ids
score = model.score([1, 2, 3]).total
prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
heavy = [m for m in sys.modules if m.split(".")[0] in ("tvm", "torch", "transformers", "rich")]
import torch
print(json.dumps([light, tokens, score, prompt, heavy, torch.ones(2).tolist()]))
"""


def test_a_process_without_compiler_runs_the_same(text_artifact: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(text_artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    light, tokens, score, prompt, heavy, ones = json.loads(done.stdout)
    assert heavy == []
    assert light
    # the caller's own torch works afterwards
    assert ones == [1, 1]
    assert prompt == "<s>[user] hello\n[assistant] "
    with load(text_artifact) as model:
        assert model.generate([1, 2, 3], max_tokens=5).token_ids == tokens
        assert model.score([1, 2, 3]).total == pytest.approx(score)


IDLE = """
import sys, time
import llmc.runtime
from llmc.runtime import library
from llmc.runtime.host import host
model = llmc.runtime.load(sys.argv[1], threads=len(host().cpus))
model.generate([3, 1, 4], max_tokens=4, ignore_eos=True)
time.sleep(0.1)  # what still spins may go to sleep
before = time.process_time()
time.sleep(1.0)
print(time.process_time() - before)
"""


def test_threads_sleep_when_nothing_runs(artifact: Path) -> None:
    """Between two answers no thread looks for work: a second of rest takes next to no processor time.

    In a process of its own: the runtime's threads are bound to processors, also this one's where another test ran a kernel.
    """
    done = subprocess.run([sys.executable, "-c", IDLE, str(artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


COMPILER_AFTER = """
import sys
from llmc import load
from llmc.runtime.library import LIBRARY_NAME
with load(sys.argv[1]) as model:
    print(model.generate([1, 2, 3], max_tokens=2).token_ids)
import llmc.compiler, tvm
print(sum(line.endswith("/" + LIBRARY_NAME + "\\n") for line in open("/proc/self/maps") if " r-xp " in line))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_compiler_can_be_imported_after_an_artifact_with_its_own_runtime_ran(llama_artifact: Path) -> None:
    assert (llama_artifact / "runtime" / library.LIBRARY_NAME).is_file()
    done = subprocess.run([sys.executable, "-c", COMPILER_AFTER, str(llama_artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "1"  # the installed library alone
