"""One engine, one turn of ``benchmarks/cpu.py``: loads a model, times it, prints one JSON line. Runs in the engine's own Python.

    python benchmarks/cpu_worker.py ENGINE MODEL THREADS PROMPT_IDS.json

Decode is greedy, 128 tokens after one; prefill is the time to the first token of the prompt. Both are the best of three in this
process, so that a turn that another program disturbs costs little; the caller takes medians over turns. ``nll``: mean negative
log-likelihood of the prompt's tokens, where the engine gives logits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

REPEATS, NEW = 3, 128


def best(run: Callable[[], float]) -> float:
    """The shortest of the repeats, after one to warm up."""
    run()
    return min(run() for _ in range(REPEATS))


def mean_nll(logits: Any, ids: list[int]) -> float:
    """Of ids[1:], from logits [len(ids), vocab]."""
    import numpy as np

    x = np.asarray(logits, np.float64)[: len(ids) - 1]
    x = x - x.max(axis=1, keepdims=True)
    chosen = x[np.arange(len(ids) - 1), ids[1:]]
    return float(np.mean(np.log(np.exp(x).sum(axis=1)) - chosen))


def run_llmc(path: str, threads: int, ids: list[int]) -> dict[str, float]:
    import llmc

    model = llmc.load(path, threads=threads, context=len(ids) + NEW + 2)

    def timed(prompt: list[int], tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        first = 0.0
        for event in model.generate(prompt, max_tokens=tokens, ignore_eos=True, temperature=0.0, stream=True):
            if event.token_ids and not first:
                first = time.perf_counter()
        return first - start, time.perf_counter() - first

    return {
        "prefill": len(ids) / best(lambda: timed(ids, 1)[0]),
        "decode": NEW / best(lambda: timed(ids[:1], NEW + 1)[1]),
        "nll": mean_nll(model.logits(ids), ids),
    }


def run_llama_cpp(path: str, threads: int, ids: list[int]) -> dict[str, float]:
    import llama_cpp
    import numpy as np

    def load(**more: Any) -> Any:
        size = {"n_ctx": len(ids) + NEW + 8, "n_batch": len(ids), "n_ubatch": len(ids)}
        return llama_cpp.Llama(path, n_threads=threads, n_threads_batch=threads, verbose=False, **size, **more)

    model = load()
    vocab = model.n_vocab()

    def step(tokens: list[int]) -> int:
        """Decode and take the best token, through the C interface: no copies of the logits."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=(vocab,)).argmax())

    def prefill() -> float:
        model._ctx.kv_cache_clear()
        start = time.perf_counter()
        step(ids)
        return time.perf_counter() - start

    def decode() -> float:
        model._ctx.kv_cache_clear()
        token = step(ids[:1])
        start = time.perf_counter()
        for _ in range(NEW):
            token = step([token])
        return time.perf_counter() - start

    figures = {"prefill": len(ids) / best(prefill), "decode": NEW / best(decode)}
    scorer = load(logits_all=True)
    scorer.eval(ids)
    return {**figures, "nll": mean_nll(scorer.scores[: len(ids)], ids)}


def run_openvino(path: str, threads: int, ids: list[int]) -> dict[str, float]:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # else a prompt is read once, and found in the cache ever after
    pipe = openvino_genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def timed(prompt: list[int], tokens: int) -> float:
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False, apply_chat_template=False)
        start = time.perf_counter()
        pipe.generate(openvino.Tensor(np.array([prompt], np.int64)), config)
        return time.perf_counter() - start

    return {
        "prefill": len(ids) / best(lambda: timed(ids, 1)),
        "decode": NEW / best(lambda: timed(ids[:1], NEW + 1)),
    }


def run_onnxruntime(path: str, threads: int, ids: list[int]) -> dict[str, float]:
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def timed(prompt: list[int], tokens: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + tokens, min_length=len(prompt) + tokens, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    return {
        "prefill": len(ids) / best(lambda: timed(ids, 1)[0]),
        "decode": NEW / best(lambda: timed(ids[:1], NEW + 1)[1]),
    }


ENGINES = {"llmc": run_llmc, "llama.cpp": run_llama_cpp, "openvino": run_openvino, "onnxruntime": run_onnxruntime}


def main() -> None:
    engine, path, threads, prompt = sys.argv[1:]
    with open(prompt, encoding="utf-8") as file:
        ids = json.load(file)
    try:
        print(json.dumps(ENGINES[engine](path, int(threads), ids)))
    except Exception as error:  # a peer that cannot run is a row of the table, not the end of it
        print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))


if __name__ == "__main__":
    main()
