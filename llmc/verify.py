"""Is an artifact whole, and does it compute what the model computes?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import manifest
from llmc.kv_layout import FLOATS

if TYPE_CHECKING:
    import numpy as np

    from llmc.progress import Progress

CHUNK_BYTES = 1 << 22
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 1969, three astronauts flew to the moon. The first of them to step out",
)
GREEDY_TOKENS = 32


@dataclass
class FileReport:
    """``problems``: one sentence per file that is missing, of another size, altered, or not in the manifest."""

    files: int
    bytes: int
    problems: list[str] = field(default_factory=list)


def verify_files(folder: Path, progress: Progress) -> FileReport:
    """Compare every file of the artifact with the sizes and sha256 of its manifest. Raises ArtifactError if that is unreadable."""
    info = manifest.read(folder)
    report = FileReport(len(info.files), sum(f.bytes for f in info.files.values()))
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {manifest.FILE_NAME}
    with progress.phase("files", total=report.bytes, unit="B") as phase:
        for name, expected in sorted(info.files.items()):
            if name not in found:
                report.problems.append(f"{name} is missing")
                continue
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                report.problems.append(f"{name} has {size} bytes, the manifest says {expected.bytes}")
            elif (digest := _sha256(folder / name)) != expected.sha256:
                report.problems.append(
                    f"{name} was altered: its sha256 is {digest[:16]}..., the manifest says {expected.sha256[:16]}..."
                )
            phase.advance(expected.bytes)
    report.problems += [f"{name} is not in the manifest" for name in sorted(found - info.files.keys())]
    return report


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass
class PromptReport:
    """One prompt's logits, artifact against reference: errors over all positions, and the greedy continuations.

    ``max_rel`` is the largest absolute error divided by the largest absolute reference logit. ``top1`` is the share of positions
    whose likeliest token agrees. ``greedy`` is how many tokens of the continuation agree before the first that does not.
    """

    prompt: str
    tokens: int
    max_abs: float
    max_rel: float
    top1: float
    greedy: int
    greedy_of: int


@dataclass
class Comparison:
    """The artifact against transformers on the same weights in float32. ``passed`` holds it to ``tolerance`` on ``max_rel``."""

    dtype: str
    tolerance: float
    prompts: list[PromptReport]

    @property
    def passed(self) -> bool:
        """Errors within tolerance everywhere; in float32 the greedy tokens must be equal too."""
        exact = self.dtype != "float32" or all(p.greedy == p.greedy_of for p in self.prompts)
        return exact and all(p.max_rel <= self.tolerance for p in self.prompts)


# The rounding of a stored weight enters each of the many products of a logit: a few units of the storage type's precision.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2, "int8": 6e-2, "fp8_e4m3": 1.5e-1, "int4": 3e-1}
"""By how weights or, the last three, keys and values are stored."""


def compare(folder: Path, model: str, progress: Progress, *, threads: int | None = None) -> Comparison:
    """Compare the artifact's logits with those that transformers computes in float32 from ``model``'s own weights.

    Raises ModelError if ``model`` cannot be read and ArtifactError if the artifact cannot be loaded.
    """
    from llmc.reference import reference_model
    from llmc.runtime import load

    compiled = load(folder, threads=threads)  # whether it runs here is known at once
    with progress.phase("load reference"):
        reference = reference_model(model)
    info = compiled.manifest
    stored = {info.kv.dtype, *(t.dtype for t in info.tensors.values() if t.dtype in FLOATS)}
    dtype = max(stored, key=lambda name: TOLERANCE[name], default="float32")
    prompts = _prompts(compiled)
    # One after the other: the waiting threads of one engine would slow the other down.
    expected = []
    with progress.phase("reference", total=len(prompts)) as phase:
        for _, ids in prompts:
            expected.append((reference.logits(ids), reference.greedy(ids, GREEDY_TOKENS)))
            phase.advance()
    reports = []
    with progress.phase("artifact", total=len(prompts)) as phase:
        for (prompt, ids), (logits, greedy) in zip(prompts, expected, strict=True):
            reports.append(_compare_prompt(compiled, prompt, ids, logits, greedy))
            phase.advance()
    return Comparison(dtype, TOLERANCE[dtype], reports)


def _prompts(compiled: Any) -> list[tuple[str, list[int]]]:
    """The prompts and their ids, cut so that the continuation fits; a model with no tokenizer gets pseudo-random ids."""
    import numpy as np

    info = compiled.manifest
    room = max(1, info.model.context - GREEDY_TOKENS)
    if info.tokenizer is not None:
        return [(text, list(compiled.tokenizer.encode(text))[:room]) for text in PROMPTS]
    rng = np.random.default_rng(0)
    sizes = [min(room, size) for size in (1, 7, 23)]
    return [(f"{size} pseudo-random tokens", rng.integers(info.model.vocab_size, size=size).tolist()) for size in sizes]


def _compare_prompt(compiled: Any, prompt: str, ids: list[int], logits: np.ndarray, expected: list[int]) -> PromptReport:
    import numpy as np

    ours, theirs = np.asarray(compiled.logits(ids), np.float64), logits.astype(np.float64)
    found = compiled.generate(ids, max_tokens=GREEDY_TOKENS, ignore_eos=True).token_ids
    worst = float(np.abs(ours - theirs).max())
    return PromptReport(
        prompt=prompt,
        tokens=len(ids),
        max_abs=worst,
        max_rel=worst / float(np.abs(theirs).max()),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        greedy=_agreeing(found, expected),
        greedy_of=len(expected),
    )


def _agreeing(found: list[int], expected: list[int]) -> int:
    """How many leading tokens are equal."""
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a != b:
            return i
    return min(len(found), len(expected))
