"""On-GPU sampling: the statistics of a row, the token drawn against the host's sampler, and the arrays of the next step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.runtime.draws import FIELD, IN_PROMPT, MOST, pack, token_counts
from llmc.runtime.sampling import Sampler, SamplingParams
from llmc.schedules.cuda import advance, sample, sample_stats
from llmc.schedules.protocol import KernelCall
from tests.support.cuda_emulator import run

TARGET = targets.parse("cuda:sm_80")
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=50, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1e-3),
    SamplingParams(temperature=30.0, top_p=0.3, min_p=0.01, top_k=10**12),
    SamplingParams(temperature=1.0, top_k=1),
]
PENALIZED = SamplingParams(
    temperature=0.8, top_p=0.7, top_k=20, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3
)
GREEDY_PENALIZED = SamplingParams(repetition_penalty=3.0, presence_penalty=-1.0, frequency_penalty=2.0)


def case(vocab: int) -> KernelCall:
    return sample._call(vocab)


def choose(logits: np.ndarray, draws: np.ndarray, positions: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the counts after it, from both kernels."""
    call = case(logits.shape[1])
    first = sample_stats._call(logits.shape[1])
    stats = np.full(first.result.bind({"n": len(draws)}), -7, np.int32)
    stats = run(sample_stats.build(first, TARGET, {}), TARGET, logits, draws, counts, stats)[-1]
    np.testing.assert_array_equal(stats, sample_stats.reference(first, logits, draws, counts))
    start = np.full(len(draws), -9, np.int32)
    after = run(sample.build(call, TARGET, {}), TARGET, logits, draws, positions, counts, stats, start)
    return after[-1], after[3]


def scenes(vocab: int) -> np.ndarray:
    """Rows of logits: flat, usual, peaked, rounded so that there are ties, with impossible tokens."""
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=(5, vocab)) * np.array([0.1, 2, 6, 1, 3])[:, None]).astype(np.float32)
    logits[3] = np.round(logits[3])
    logits[4, ::3] = -np.inf
    return logits


@pytest.mark.parametrize("family", [sample_stats, sample, advance])
def test_a_family_takes_its_own_shapes(family: Any) -> None:
    for call in family.SHAPES.values():
        assert family.matches(call, TARGET)
        assert family.matches(call, targets.parse("cpu:x86-64-v3")) is None
        moved, flops = family.roofline(call, n=3, r=3, m=2, slots=1)
        assert moved > 0 and flops > 0


@pytest.mark.parametrize(("vocab", "rounds"), [(37, 2), (4097, 1)])
def test_every_draw_is_the_host_samplers(vocab: int, rounds: int) -> None:
    logits = scenes(vocab)
    counts = np.zeros((7, vocab), np.int16)
    records, positions, samplers = [], [], []
    for i, params in enumerate([*PARAMS, PENALIZED, GREEDY_PENALIZED] * rounds):
        seed, stream = i * 0x123456789ABCDEF % 2**64, i % 3
        params = SamplingParams(**{**vars(params), "seed": seed})
        penalties = params.repetition_penalty != 1
        prompt = [1, 2, 3, 11]
        slot = -1
        if penalties:
            slot = len({r[FIELD["slot"]] for r in records} - {-1})
            counts[slot] = token_counts(vocab, prompt, [])
        records.append(pack(params, seed, stream, slot, i % len(logits)))
        positions.append(i * 17)
        samplers.append(Sampler(params, prompt, vocab, stream))
    draws, at = np.stack(records), np.array(positions, np.int32)
    found, after = choose(logits, draws, at, counts)
    rows = draws[:, FIELD["row"]]
    want = [s.sample(logits[row], int(p)) for s, row, p in zip(samplers, rows, at, strict=True)]
    assert found.tolist() == want
    for record, token in zip(draws, found, strict=True):
        slot = record[FIELD["slot"]]
        if slot >= 0:
            assert after[slot, token] == counts[slot, token] + 1
            after[slot, token] -= 1
    np.testing.assert_array_equal(after, counts)


def test_penalties_follow_a_sequence() -> None:
    vocab, steps, prompt = 40, 4, [7, 7, 3]
    logits = np.random.default_rng(3).normal(size=(steps, vocab)).astype(np.float32) * 2
    both = [SamplingParams(**{**vars(params), "seed": 5}) for params in (PENALIZED, GREEDY_PENALIZED)]
    hosts = [Sampler(params, prompt, vocab, stream=2) for params in both]
    counts = np.stack([token_counts(vocab, prompt, [])] * 2)
    for step in range(steps):
        records = np.stack([pack(params, 5, 2, slot, step) for slot, params in enumerate(both)])
        tokens, counts = choose(logits, records, np.full(2, 3 + step, np.int32), counts)
        assert tokens.tolist() == [host.sample(logits[step], 3 + step) for host in hosts]
    assert ((counts & MOST).sum(axis=1) == steps).all()
    for row in counts:
        assert sorted(np.flatnonzero(row & np.int16(IN_PROMPT)).tolist()) == [3, 7]


def test_a_token_count_stops_at_its_largest_value() -> None:
    logits = np.zeros((1, 5), np.float32)
    logits[0, 2] = 9
    counts = token_counts(5, [2], [2] * 40000)[None]
    assert counts[0, 2] == -1
    params = SamplingParams(repetition_penalty=1.01)
    token, after = choose(logits, pack(params, 0, 0, 0, 0)[None], np.array([1], np.int32), counts)
    assert token.tolist() == [2]
    np.testing.assert_array_equal(after, counts)


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = np.zeros((4, 4100), np.float32)
    logits[0, 4099] = np.nan
    logits[1, 7] = np.inf
    logits[2] = -np.inf
    records = np.stack([pack(SamplingParams(temperature=t), 1, 0, -1, i) for t in (0.0, 1.0) for i in range(4)])
    tokens, _ = choose(logits, records, np.arange(8, dtype=np.int32), np.zeros((1, 4100), np.int16))
    assert tokens.reshape(2, 4)[:, :3].tolist() == [[-1] * 3] * 2 and (tokens.reshape(2, 4)[:, 3] >= 0).all()


@pytest.mark.parametrize("vocab", [50257, pytest.param(262144, marks=pytest.mark.slow)])
def test_draws_of_a_large_vocabulary(vocab: int) -> None:
    """Several chunks, several runs of ids for each warp, and an odd end."""
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(2, vocab)).astype(np.float32) * 3
    chosen = [PARAMS[1], PARAMS[4], SamplingParams(temperature=2.0, top_p=0.99)]
    draws = np.stack([pack(p, 77 + i, 0, -1, i % 2) for i, p in enumerate(chosen)])
    positions = np.array([5, 6, 2**31 - 2], np.int32)
    counts = np.zeros((1, vocab), np.int16)
    found, _ = choose(logits, draws, positions, counts)
    np.testing.assert_array_equal(found, sample.reference(case(vocab), logits, draws, positions, counts))


@pytest.mark.parametrize("label", sorted(advance.SHAPES))
def test_advance(label: str) -> None:
    call = advance.SHAPES[label]
    size = int(call.attr("page_size"))
    tokens = np.array([5, 9, -1, 3], np.int32)
    positions = np.array([0, size - 1, 2 * size, 3 * size - 1], np.int32)
    table = np.random.default_rng(0).permutation(12).reshape(4, 3).astype(np.int32)
    arrays = [tokens, np.zeros(4, np.int32), positions, positions + 1, table]
    after = run(advance.build(call, TARGET, {}), TARGET, *arrays, np.full(4, -1, np.int32))
    np.testing.assert_array_equal(after[1], [5, 9, 0, 3])
    np.testing.assert_array_equal(after[2], positions + 1)
    np.testing.assert_array_equal(after[3], positions + 2)
    np.testing.assert_array_equal(after[5], advance.reference(call, *arrays))
    assert after[5][1] == table[1, 1] * size and after[5][0] == table[0, 0] * size + 1
