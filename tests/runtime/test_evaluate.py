"""Evaluation: every figure against a direct float64 computation, intervals against scipy's, windows, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import RequestError, UsageError
from llmc.evaluate import evaluate, student
from llmc.progress import SilentProgress
from llmc.texts import CALIBRATION, EVALUATION, read_text, windows

VOCAB = 37


class Fixed:
    """Logits that depend on position, token and seed alone, given in chunks of ``chunk`` rows."""

    def __init__(self, seed: int, chunk: int, vocab: int = VOCAB) -> None:
        self.table = np.random.default_rng(seed).standard_normal((64, VOCAB, vocab)).astype(np.float32) * 2
        self.chunk = chunk

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.table[np.arange(len(ids)), ids]

    def teacher_forced(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        buffer = np.empty((self.chunk, self.table.shape[2]), np.float32)  # reused, as the runtime's is
        for start in range(0, len(ids), self.chunk):
            rows = self.logits(ids)[start : start + self.chunk]
            buffer[: len(rows)] = rows
            yield start, buffer[: len(rows)]


def direct(model: Fixed, reference: Fixed, ids: list[int]) -> list[float]:
    """nll, the reference's nll, KL divergence and agreement, in float64."""
    each = np.arange(len(ids) - 1)
    q, p = (np.exp(m.logits(ids)[:-1].astype(np.float64)) for m in (model, reference))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    kl = (p * np.log(p / q)).sum(1)
    same = p.argmax(1) == q.argmax(1)
    return [-np.log(q[each, ids[1:]]).mean(), -np.log(p[each, ids[1:]]).mean(), kl.mean(), same.mean()]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_figures_are_those_of_the_definitions(chunk: int) -> None:
    model, reference = Fixed(1, chunk), Fixed(2, 64)
    texts = np.random.default_rng(0).integers(0, VOCAB, (6, 20)).tolist()
    found, own = evaluate([model, reference], texts, reference, SilentProgress())
    nll, theirs, kl, same = np.array([direct(model, reference, ids) for ids in texts]).T
    assert (found.tokens, found.windows, found.window) == (6 * 19, 6, 20)
    assert found.perplexity.value == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    beside = found.against
    assert beside is not None
    assert beside.perplexity.value == pytest.approx(np.exp(theirs.mean()), rel=1e-5)
    assert beside.ratio.value == pytest.approx(np.exp((nll - theirs).mean()), rel=1e-5)
    assert beside.kl.value == pytest.approx(kl.mean(), rel=1e-5)
    assert beside.top1.value == pytest.approx(same.mean())
    half = 2.5705818366147395 * kl.std(ddof=1) / np.sqrt(6)  # t of 0.975 with 5 degrees of freedom, from a table
    assert beside.kl.high - beside.kl.value == pytest.approx(half, rel=1e-3)
    assert own.against is not None
    assert own.against.kl.value == pytest.approx(0, abs=1e-6) and own.against.top1.value == 1
    assert (own.against.ratio.low, own.against.ratio.high) == (1, 1)


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.302653), (4, 2.776445), (10, 2.228139), (50, 2.008559), (1000, 1.962339)])
def test_student_quantiles_are_those_of_the_table(freedom: int, quantile: float) -> None:
    assert student(0.975, freedom) == pytest.approx(quantile, rel=1e-2)


def test_other_vocabularies_and_single_windows_are_refused() -> None:
    ids = [[1, 2, 3], [3, 2, 1], [4, 5, 6]]
    with pytest.raises(RequestError, match="vocabulary of 37 tokens and the reference one of 40"):
        evaluate([Fixed(1, 9)], ids, Fixed(2, 9, vocab=40), SilentProgress())
    with pytest.raises(RequestError, match="takes 3 windows of text, and there are 2"):
        evaluate([Fixed(1, 9)], ids[:2], None, SilentProgress())


def test_windows_are_disjoint_and_spread() -> None:
    ids = list(range(100, 123))
    assert windows(ids, 5) == [ids[i : i + 5] for i in (0, 5, 10, 15)]
    assert windows(ids, 5, most=2) == [ids[0:5], ids[10:15]]
    assert windows([1, *ids], 5, bos=1) == [[1, *ids[i : i + 4]] for i in (0, 4, 8, 12, 16)]
    with pytest.raises(RequestError, match="23 tokens and a window 24"):
        windows(ids, 24)


def test_shipped_texts_are_disjoint_plain_and_say_where_they_come_from(tmp_path: Path) -> None:
    paragraphs = []
    for path in (CALIBRATION, EVALUATION):
        assert "Public domain" in path.read_text(encoding="utf-8").splitlines()[0]
        text = read_text(path)
        assert 100_000 < len(text) < 130_000 and "Sources:" not in text
        paragraphs.append({line for line in text.splitlines() if len(line) > 80})
    assert not paragraphs[0] & paragraphs[1]
    own = tmp_path / "own.txt"
    own.write_text("# a heading stays\n")
    assert read_text(own) == "# a heading stays\n"
    own.write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        read_text(own)
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(own)
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "none.txt")
