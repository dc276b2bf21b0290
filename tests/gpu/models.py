"""Every decoder family on a GPU against transformers: compiled where the compiler is, run where the GPU is.

    python -m tests.gpu.models prepare FOLDER [--target cuda:sm_90a] [--dtype bfloat16]   needs no GPU
    python -m tests.gpu.models run FOLDER [--only llama]                                  needs no compiler: numpy and tvm_ffi

``prepare`` compiles each family twice: with the odd sizes of ``tests/support``, which take the kernels that fit every shape, and
with regular ones, which take the fast kernels. Beside each artifact lie prompts, transformers' logits in float32 over the weights
as they are stored, and how far transformers itself is off when it computes in the storage dtype. ``run`` reads the prompts in
ragged chunks, decodes the rest token by token, and compares.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REGULAR: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
REGULAR_CHANGES: dict[str, dict[str, Any]] = {
    "llama": REGULAR,
    "mistral": {**REGULAR, "head_dim": 64, "sliding_window": 40},
    "qwen2": REGULAR,
    "qwen3": {**REGULAR, "head_dim": 128},
    "gemma2": {**REGULAR, "head_dim": 128, "sliding_window": 40, "query_pre_attn_scalar": 128},
    "gemma3_text": {**REGULAR, "head_dim": 256, "sliding_window": 40, "query_pre_attn_scalar": 256},
    "phi3": {**REGULAR, "num_key_value_heads": 8, "hidden_size": 640, "partial_rotary_factor": 1.0},
    "gpt2": {"n_embd": 256, "n_head": 4},
    "gpt_neox": {**REGULAR, "num_key_value_heads": 8, "hidden_size": 768},
    "starcoder2": REGULAR,
    "olmo2": REGULAR,
    "granite": REGULAR,
    "stablelm": {**REGULAR, "hidden_size": 512},
    "cohere": {**REGULAR, "hidden_size": 512},
    "mixtral": {**REGULAR, "head_dim": 64},
    "qwen3_moe": {**REGULAR, "head_dim": 64, "moe_intermediate_size": 128},
    "gpt_oss": {**REGULAR, "head_dim": 64, "sliding_window": 40},
}
LENGTHS = (171, 23, 48)
"""Tokens of the sequences. The last ``DECODED`` of each are decoded one by one, together. The first is long enough for rows whose
window is past the first tile of keys."""

CONTEXT = 192

DECODED = 6
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
"""Largest ||found - expected|| / ||expected||, unless transformers in the same dtype is off by more."""

REROUTED = 3.0
"""A row that is off by more than so many times the median of all rows went to other experts than in float32: its router's scores
were nearly equal. In a model without experts there is none."""


MOST_REROUTED = 0.1
"""Part of the rows that may have gone to other experts even if transformers' in the storage dtype are fewer. Which near ties
fall the other way is chance, and rows behind see a rerouted one: 49 of mixtral's 242 rows have scores closer to a tie than
0.06 of their spread, and 12 of our 17 are among these."""


@dataclass
class Result:
    """Relative errors of the logits of prefill, of decode, and of transformers in the storage dtype, all without rerouted rows, and
    how many rows those are (ours, theirs). ``misses``: tokens whose choice is worse than rounding explains."""

    name: str
    prefill: float
    decode: float
    theirs: float
    tolerance: float
    rerouted: tuple[int, int]
    rows: int
    misses: int

    @property
    def right(self) -> bool:
        limit = max(self.tolerance, 1.5 * self.theirs)
        ours, theirs = self.rerouted
        return (
            self.prefill <= limit
            and self.decode <= limit
            and self.misses == 0
            and ours <= max(2 * theirs, MOST_REROUTED * self.rows)
        )  # NaN is not


def prepare(folder: Path, target: str, dtype: str, only: str = "") -> list[Path]:
    """Compile every family whose name contains ``only``; the folders made."""
    from llmc.compiler import compile as compile_model
    from tests.support.tiny_models import MODELS, build

    cases = {f"{kind}-odd": (kind, {}) for kind in MODELS}
    cases |= {f"{kind}-regular": (kind, changes) for kind, changes in REGULAR_CHANGES.items()}
    made = []
    for name, (kind, changes) in cases.items():
        if only not in name:
            continue
        start = time.perf_counter()
        source, out = folder / f"{name}.model", folder / name
        positions = {"n_positions" if kind == "gpt2" else "max_position_embeddings": CONTEXT}
        build(kind, source, dtype=dtype, **positions, **changes)
        compile_model(str(source), out=out, target=target, dtype=dtype, max_batch=4, page_size=16, context=CONTEXT, force=True)
        _write_reference(source, out / "reference.npz", dtype)
        shutil.rmtree(source)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        made.append(out)
    return made


def _write_reference(source: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(5)
    arrays: dict[str, np.ndarray] = {"dtype": np.array(dtype)}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    models = {
        name: AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, name), **eager).eval()
        for name in ("float32", dtype)
    }
    vocab = models["float32"].config.get_text_config().vocab_size
    for i, length in enumerate(LENGTHS):
        ids = rng.integers(0, vocab, length)
        arrays[f"ids{i}"] = ids
        for name, model in models.items():
            with torch.no_grad():
                arrays[f"{'expected' if name == 'float32' else 'narrow'}{i}"] = (
                    model(torch.tensor(ids)[None]).logits[0].float().numpy()
                )
    np.savez(out, **arrays)  # type: ignore[arg-type]


def check(artifact: Path) -> Result:
    """Run the artifact on this machine's GPU and compare."""
    from llmc.runtime.artifact import open_artifact
    from llmc.runtime.batch import Chunk, build_step
    from llmc.runtime.gpu.cuda import CudaExecutor
    from llmc.runtime.pages import PageAllocator
    from llmc.runtime.sequence import Sequence

    saved = np.load(artifact / "reference.npz")
    opened = open_artifact(artifact)
    pages = 64
    executor = CudaExecutor(opened, pages)
    allocator = PageAllocator(pages, opened.manifest.kv.page_size)
    ids = [saved[f"ids{i}"].tolist() for i in range(len(LENGTHS))]
    expected = [saved[f"expected{i}"] for i in range(len(LENGTHS))]
    sequences = [Sequence(tokens, allocator) for tokens in ids]

    def step(*plan: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Run so many rows of each sequence, all with logits: found and expected."""
        chunks = [Chunk(sequences[i], rows, rows) for i, rows in plan]
        wanted = [expected[i][sequences[i].table.length :][:rows] for i, rows in plan]
        for chunk in chunks:
            chunk.sequence.table.reserve(chunk.rows, executor.copy_page)
        found = executor.run(build_step(chunks)).copy()
        for chunk in chunks:
            chunk.sequence.table.advance(chunk.rows)
        return found, np.concatenate(wanted)

    read = [length - DECODED for length in LENGTHS]
    prefill = [step((0, 33)), step((0, 90)), step((0, read[0] - 123), (1, 5)), step((1, read[1] - 5), (2, read[2]))]
    decode = [step(*((i, 1) for i in range(len(LENGTHS)))) for _ in range(DECODED)]
    executor.close()
    narrow = np.concatenate([saved[f"narrow{i}"] for i in range(len(LENGTHS))])
    routed = any(k.op in ("llmc.moe", "llmc.quantized_moe") for k in opened.variant.kernels)
    theirs, their_flips = _kept(narrow, np.concatenate(expected), routed)
    parts = [_kept(*(np.concatenate(side) for side in zip(*steps, strict=True)), routed) for steps in (prefill, decode)]
    tolerance, their_error = TOLERANCE[str(saved["dtype"])], _error(*theirs)
    misses = sum(_misses(*rows, max(tolerance, their_error)) for rows, _ in parts)
    flips = sum(count for _, count in parts)
    errors = (_error(*rows) for rows, _ in parts)
    return Result(artifact.name, *errors, their_error, tolerance, (flips, their_flips), len(narrow), misses)


def _kept(found: np.ndarray, expected: np.ndarray, routed: bool) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """The rows that were not rerouted, and how many were; without experts (``routed``) all of them and none."""
    if not routed:
        return (found, expected), 0
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    rerouted = error > REROUTED * np.median(error)  # no NaN is, and all stay to be found out
    return (found[~rerouted], expected[~rerouted]), int(rerouted.sum())


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _misses(found: np.ndarray, expected: np.ndarray, error: float) -> int:
    """Rows whose greedy token the reference scores lower than its best by more than eight times the rounding error of a logit."""
    chosen = np.take_along_axis(expected, found.argmax(-1)[:, None], -1)[:, 0]
    scale = np.sqrt((expected**2).mean(-1))
    return int((expected.max(-1) - chosen > 8 * error * scale).sum())


def run(folder: Path, only: str = "") -> list[Result]:
    """Check every artifact of ``folder`` whose name contains ``only``, and print a table."""
    results = []
    print("| model | right | prefill error | decode error | transformers' error | rerouted rows, ours / theirs | wrong tokens |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for artifact in sorted(p.parent for p in folder.glob("*/reference.npz") if only in p.parent.name):
        r = check(artifact)
        results.append(r)
        verdict = "yes" if r.right else "NO"
        errors = f"{r.prefill:.1e} | {r.decode:.1e} | {r.theirs:.1e}"
        print(f"| {r.name} | {verdict} | {errors} | {r.rerouted[0]} / {r.rerouted[1]} | {r.misses} |", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.folder, args.target, args.dtype, args.only)
        return 0
    return int(not all(result.right for result in run(args.folder, args.only)))


if __name__ == "__main__":
    sys.exit(main())
