"""Does a GPU generate the same tokens at every run, and those that its logits ask for?

    python benchmarks/cuda.py prepare FOLDER [--only 1b]        where the compiler is; needs no GPU
    python -m tests.gpu.generation FOLDER [--only 1b]           on the GPU: numpy, torch, tvm_ffi

Prompts of odd lengths are continued greedily over several pages of the KV cache, so that sequences begin their pages at different
steps. The device chooses the tokens, and the host starts steps ahead, several times over; then logits go to the host for every
token and nothing runs ahead. All of these must say the same. Then the text is read once as a prompt, by other kernels, which
must choose the same tokens up to rounding. Last, every two artifacts that follow each other generate at the same time, taking
turns and in two threads, and must say what each said alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cuda_smoke import fill_weights
from benchmarks.cuda_steps import HostSampling
from tests.gpu.models import _misses

BATCHES = (1, 8, 32, 128)
TOKENS = 176
RUNS = 3
READ = 8
"""Sequences of a batch that are read again as prompts."""

ROUNDING = 3e-2
"""Relative error of a logit between the kernels of decode and those of prefill: random weights round by more than real ones."""

MEMORY = 4 << 30


class Loaded:
    """An artifact on the GPU: as it generates, and with the tokens chosen on the host."""

    def __init__(self, folder: Path) -> None:
        import llmc
        from llmc.runtime.model import Model

        fill_weights(folder)
        self.name = folder.name
        self.model = llmc.load(folder, context=1024, kv_memory=MEMORY)
        executor: Any = HostSampling(self.model._open_executor())
        self.host = Model(self.model.manifest, executor, folder, context=1024)

    def prompts(self, batch: int) -> list[list[int]]:
        rng = np.random.default_rng(batch)
        return [rng.integers(0, self.model.manifest.model.vocab_size, 3 + 37 * i % 29).tolist() for i in range(batch)]

    def tokens(self, model: Any, batch: int) -> list[list[int]]:
        found = model.generate(self.prompts(batch), max_tokens=TOKENS, ignore_eos=True)
        return [c.token_ids for c in found]

    def misread(self, batch: int, tokens: list[list[int]]) -> int:
        """Tokens that logits of the whole text score lower than their best by more than rounding explains."""
        wrong = 0
        for i in range(0, batch, -(-batch // READ)):
            prompt = self.prompts(batch)[i]
            logits = self.model.logits(prompt + tokens[i][:-1])[len(prompt) - 1 :]
            chosen = np.zeros_like(logits)
            chosen[np.arange(len(logits)), tokens[i]] = 1
            wrong += _misses(chosen, logits, ROUNDING)
        return wrong


def check(loaded: Loaded, batch: int) -> bool:
    """Print a line of the table; whether it is right."""
    start = time.perf_counter()
    runs = [loaded.tokens(loaded.model, batch) for _ in range(RUNS)]
    ahead = time.perf_counter() - start
    host = loaded.tokens(loaded.host, batch)
    same = [sum(a == b for a, b in zip(host, run, strict=True)) for run in runs]
    misread = loaded.misread(batch, runs[0])
    right = min(same) == batch and misread == 0
    first = [int(np.argmax(np.array(a) != b)) for a, b in zip(host, runs[0], strict=True) if a != b]
    where = f"first differences {sorted(first)[:8]}" if first else ""
    verdict = "yes" if right else "NO"
    print(f"| {loaded.name} | {batch} | {verdict} | {same} | {misread} | {ahead:.1f} | {where} |", flush=True)
    return right


def together(pair: tuple[Loaded, Loaded], batch: int) -> bool:
    """Whether two models of a process say the same at the same time as alone."""
    alone = [one.tokens(one.model, batch) for one in pair]

    def streamed() -> list[list[list[int]]]:
        streams = [one.model.generate(one.prompts(batch), max_tokens=TOKENS, ignore_eos=True, stream=True) for one in pair]
        said: list[list[list[int]]] = [[[] for _ in range(batch)] for _ in pair]
        for _ in range(TOKENS * batch):
            for stream, found in zip(streams, said, strict=True):
                event = next(stream)
                found[event.index] += event.token_ids
        return said

    turns = streamed()
    with ThreadPoolExecutor(2) as threads:
        parallel = list(threads.map(lambda one: one.tokens(one.model, batch), pair))
    right = turns == alone and parallel == alone
    names, verdict = " + ".join(one.name for one in pair), "yes" if right else "NO"
    print(f"| {names} | {batch} | {verdict} | in turns {turns == alone}, in threads {parallel == alone} | | | |", flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    print("| model | sequences | right | as the host, of each run | misread | s | |\n|---|---:|---|---|---:|---:|---|")
    all_of_them = [Loaded(p) for p in sorted(args.folder.iterdir()) if (p / "manifest.json").is_file() and args.only in p.name]
    right = [check(one, b) for one in all_of_them for b in BATCHES if b <= one.model.limits.max_batch]
    right += [together(pair, 8) for pair in pairwise(all_of_them)]
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
