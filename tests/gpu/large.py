"""Models of 1.2 and 8 billion parameters on a GPU against torch: every range of rows that has a kernel of its own.

    python benchmarks/cuda.py prepare FOLDER [--only 1b]    where the compiler is; needs no GPU
    python -m tests.gpu.large FOLDER [--only 1b]            on the GPU: numpy, torch, tvm_ffi; quantized models the compiler too

The tiny models of :mod:`.models` are too small for the kernels that stream large matrices. One text is read in chunks of growing
size, and batches of growing size decode the tokens that follow its prefixes; logits are compared with torch in float32 over the
same weights, next to what torch itself is off by in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cuda_smoke import MODELS, Runner, TorchDecoder, fill_weights
from tests.gpu.models import TOLERANCE, _error, _misses

CHUNKS = (7, 14, 20, 50, 100, 200, 400, 600, 1500)
BATCHES = (1, 5, 12, 24, 48, 100)
KEPT = 4
"""Rows of a chunk that are compared, the last ones; and decode steps of a batch."""

PAGES = 4096


def check(folder: Path) -> list[tuple[str, float, float, int]]:
    """(what, relative error, torch's in bfloat16, wrong greedy tokens) of an artifact whose weights are filled in."""
    import torch

    runner = Runner(folder, True, PAGES)
    limits = runner.manifest.limits
    config = MODELS[folder.name.split("-")[0]]
    chunks = [c for c in CHUNKS if c <= limits.max_rows]
    text = [int(t) for t in np.random.default_rng(3).integers(0, config["vocab_size"], sum(chunks))]
    wide = TorchDecoder(folder, runner.manifest, config)
    wanted, narrow = wide.logits(text), wide.rounded("bfloat16").logits(text)
    del wide
    torch.cuda.empty_cache()
    found = [*_prefill(runner, text, chunks), *_decode(runner, text, [b for b in BATCHES if b <= limits.max_batch])]
    runner.executor.close()
    results = []
    for what, rows, logits in found:
        theirs = _error(narrow[rows], wanted[rows])
        misses = _misses(logits, wanted[rows], max(TOLERANCE["bfloat16"], theirs))
        results.append((what, _error(logits, wanted[rows]), theirs, misses))
    return results


def _prefill(runner: Runner, text: list[int], chunks: list[int]) -> Iterator[tuple[str, list[int], np.ndarray]]:
    sequence, read = runner.sequence(text), 0
    for rows in chunks:
        kept = min(KEPT, rows, runner.manifest.limits.max_logit_rows)
        logits = runner.step((sequence, rows, kept))
        read += rows
        yield f"prefill of {rows}", list(range(read - kept, read)), logits
    sequence.table.release()


def _decode(runner: Runner, text: list[int], batches: list[int]) -> Iterator[tuple[str, list[int], np.ndarray]]:
    for batch in batches:
        lengths = [3 + 37 * i % 190 for i in range(batch)]
        sequences: list[Any] = [runner.sequence(text[: length + KEPT]) for length in lengths]
        for sequence, length in zip(sequences, lengths, strict=True):
            runner.step((sequence, length, 1))
        steps = [runner.step(*((s, 1, 1) for s in sequences)) for _ in range(KEPT)]
        yield f"decode of {batch}", [length + i for i in range(KEPT) for length in lengths], np.concatenate(steps)
        for sequence in sequences:
            sequence.table.release()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    wrong = 0
    print("| model | step | right | error | torch's error in bfloat16 | wrong tokens |\n|---|---|---|---:|---:|---:|")
    for artifact in sorted(p for p in args.folder.iterdir() if (p / "manifest.json").is_file() and args.only in p.name):
        fill_weights(artifact)
        for what, error, theirs, misses in check(artifact):
            right = error <= max(TOLERANCE["bfloat16"], 1.5 * theirs) and misses == 0
            wrong += not right
            print(f"| {artifact.name} | {what} | {'yes' if right else 'NO'} | {error:.1e} | {theirs:.1e} | {misses} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
