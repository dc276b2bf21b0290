"""A model that computes something else is found before it is timed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.tune.turns import CHOSEN, Workload, _Server, _Subject

VOCAB, CONTEXT = 50, 96


class Stub:
    """A model whose next token follows from the last one, ``step`` ids on, with some noise; ``shift``: what it chooses instead."""

    def __init__(self, shift: int = 0, noise: float = 0.0) -> None:
        self.shift, self.noise, self.context = shift, noise, CONTEXT
        self.manifest = SimpleNamespace(model=SimpleNamespace(vocab_size=VOCAB))

    def logits(self, ids: list[int]) -> np.ndarray:
        rng = np.random.default_rng(len(ids))
        found = rng.normal(size=(len(ids), VOCAB)) * self.noise
        found[np.arange(len(ids)), (np.array(ids) * 7 + 3) % VOCAB] += 5
        return found.astype(np.float32)

    def generate(self, prompts: list[list[int]], max_tokens: int, **_: Any) -> list[Any]:
        found = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(max_tokens):
                ids.append((ids[-1] * 7 + 3 + self.shift) % VOCAB)
            found.append(SimpleNamespace(token_ids=ids[len(prompt) :]))
        return found


def subject(**how: Any) -> _Subject:
    made = _Subject.__new__(_Subject)
    made.model, made._stream, made._test, made._left = Stub(**how), None, None, 0
    return made


@pytest.mark.parametrize("test", [Workload("decode", 1), Workload("decode", 8, 20), Workload("prefill", 40)])
def test_tokens_of_the_rival_are_judged_by_the_base(test: Workload) -> None:
    base = subject(noise=0.3)
    assert base.misread(subject(noise=0.3), test) == 0
    assert base.misread(subject(shift=1), test) == CHOSEN * min(test.sequences, 4)


def test_a_rival_that_computes_something_else_fails() -> None:
    server = _Server()
    server.pair = [subject(), subject(shift=2)]
    answer = server.answer({"time": ["decode", 2, 16], "rounds": 3})
    assert "at 2 sequences of 16 16 tokens are not what the model says" in answer["failed"]
