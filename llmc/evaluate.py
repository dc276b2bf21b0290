"""How well a compiled model predicts a text, and how far it is from the model it was made of.

The text is cut into disjoint windows, each scored on its own: every token but a window's first is predicted from those before it.
Per window there is the mean of each figure over its tokens:

==============  =======================================================================================================
nll             - log q(token), the negative log-likelihood in nats; perplexity = exp(mean nll)
excess          nll minus that of the reference on the same tokens; exp of its mean is the ratio of the two perplexities
KL divergence   Σ_v p(v) (log p(v) - log q(v)) in nats, p the reference's distribution of the next token, q the artifact's
top-1           whether both find the same token the likeliest
==============  =======================================================================================================

Tokens of one window depend on each other, windows hardly: a figure is the mean m over W windows with the confidence interval
m ± t · s / √W, where s is the sample's standard deviation over windows and t the quantile of Student's distribution with W - 1
degrees of freedom (Cochran, "Sampling Techniques", ch. 9: clusters of equal size). Intervals of perplexities are the
exponentials of those of their logarithms. Comparisons are paired by window, which takes out how hard a passage is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmc import manifest
from llmc.errors import RequestError
from llmc.texts import windows

if TYPE_CHECKING:
    from llmc.progress import Progress
    from llmc.runtime import Model

WINDOW = 512
LEAST_WINDOWS = 3
CONFIDENCE = 0.95


class Predictor(Protocol):
    """A model that gives its logits for given tokens."""

    def teacher_forced(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Logits after every token in chunks: (index of the first row, float32 [rows, vocab], valid until the next chunk)."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval of :data:`CONFIDENCE`."""

    value: float
    low: float
    high: float

    def exp(self) -> Estimate:
        return Estimate(exp(self.value), exp(self.low), exp(self.high))


@dataclass(frozen=True)
class Divergence:
    """An artifact beside its reference. ``ratio``: of the perplexities; ``kl`` in nats per token; ``top1``: a share."""

    perplexity: Estimate
    ratio: Estimate
    kl: Estimate
    top1: Estimate


@dataclass(frozen=True)
class Evaluation:
    """``tokens`` were predicted, in ``windows`` of ``window`` tokens each; ``nll`` in nats per token."""

    tokens: int
    windows: int
    window: int
    nll: Estimate
    perplexity: Estimate
    against: Divergence | None


def evaluate(
    models: Sequence[Predictor], texts: Sequence[Sequence[int]], reference: Predictor | None, progress: Progress
) -> list[Evaluation]:
    """Score ``models`` on windows of tokens, all of one length of 2 or more, each beside ``reference`` if there is one.

    Every window goes through all models before the next, so that the reference computes it once. Raises RequestError for fewer
    windows than :data:`LEAST_WINDOWS`, which allow no interval, and if vocabularies differ.
    """
    if len(texts) < LEAST_WINDOWS:
        raise RequestError(
            f"a confidence interval takes {LEAST_WINDOWS} windows of text, and there are {len(texts)}: "
            "give a longer text or shorter windows"
        )
    results: list[list[list[float]]] = [[] for _ in models]
    with progress.phase("evaluate", total=len(texts) * len(models)) as phase:
        for ids in texts:
            expected = None if reference is None else np.concatenate([rows.copy() for _, rows in reference.teacher_forced(ids)])
            for found, model in zip(results, models, strict=True):
                found.append(_window(model, np.asarray(ids), expected))
                phase.advance()
    length = len(texts[0])
    return [_summary(np.array(found), length) for found in results]


def _window(model: Predictor, ids: np.ndarray, expected: np.ndarray | None) -> list[float]:
    """Means over the predicted tokens of one window: nll and, beside a reference, its nll, KL divergence and agreement."""
    sums = np.zeros(1 if expected is None else 4)
    count = len(ids) - 1
    for start, logits in model.teacher_forced(ids.tolist()):
        rows = min(len(logits), count - start)
        if rows < 1:
            continue
        span = slice(start, start + rows)
        targets, each = ids[start + 1 : start + 1 + rows], np.arange(rows)
        q = log_softmax(logits[:rows])
        sums[0] -= q[each, targets].sum(dtype=np.float64)
        if expected is not None:
            if expected.shape[1] != q.shape[1]:
                raise RequestError(
                    f"the artifact has a vocabulary of {q.shape[1]} tokens and the reference one of {expected.shape[1]}: "
                    "compare models with one tokenizer"
                )
            p = log_softmax(expected[span])
            sums[1] -= p[each, targets].sum(dtype=np.float64)
            sums[3] += (p.argmax(axis=1) == q.argmax(axis=1)).sum()
            np.subtract(p, q, out=q)
            sums[2] += np.einsum("rv,rv->r", np.exp(p, out=p), q).sum(dtype=np.float64)
    return list(sums / count)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis of float32 [rows, vocab], as a new array."""
    y = x - x.max(axis=-1, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return y


def student(probability: float, freedom: int) -> float:
    """A quantile of Student's t distribution, by its expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5).

    Within 1 % for 2 degrees of freedom or more at the usual probabilities.
    """
    z = NormalDist().inv_cdf(probability)
    series = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(series))


def _estimate(values: np.ndarray) -> Estimate:
    """The mean of one value per window, with its interval."""
    mean = float(values.mean())
    half = student((1 + CONFIDENCE) / 2, len(values) - 1) * float(values.std(ddof=1)) / sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def _summary(found: np.ndarray, length: int) -> Evaluation:
    nll = _estimate(found[:, 0])
    against = None
    if found.shape[1] > 1:
        against = Divergence(
            perplexity=_estimate(found[:, 1]).exp(),
            ratio=_estimate(found[:, 0] - found[:, 1]).exp(),
            kl=_estimate(found[:, 2]),
            top1=_estimate(found[:, 3]),
        )
    return Evaluation(len(found) * (length - 1), len(found), length, nll, nll.exp(), against)


def predictor(name: str, *, context: int, threads: int | None = None) -> Predictor:
    """What ``--against`` names: an artifact, loaded, or a model, run by transformers in float32."""
    if (Path(name) / manifest.FILE_NAME).is_file():
        from llmc.runtime import load

        return load(Path(name), threads=threads, context=context)
    from llmc.reference import reference_model

    return reference_model(name)


def text_windows(model: Model, text: str, length: int = WINDOW, most: int | None = None) -> list[list[int]]:
    """``text`` as windows of tokens for ``model``, each with the BOS token if its tokenizer starts texts with one."""
    ids = model.encode(text)
    files = model.manifest.tokenizer
    bos = files.bos_token_id if files is not None and ids[0] == files.bos_token_id else None
    return windows(ids, min(length, model.context), most, bos)
