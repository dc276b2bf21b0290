"""Sampling parameters are checked; the sampler's distribution and penalties are the documented formulas'."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmc.errors import InternalError, RequestError
from llmc.runtime.sampling import Sampler, SamplingParams, candidates, log_softmax, most_probable, nucleus, uniform

LOGITS = np.array([1.0, 2.5, -0.7, 2.5, 0.0, -3.0, 1.9], np.float32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", "hot"), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01), ("min_p", 1.5),
        ("repetition_penalty", 0.0), ("presence_penalty", 2.5), ("frequency_penalty", -2.1), ("seed", -1), ("seed", 2**64),
        ("stop", ("",)), ("stop", (3,)), ("logprobs", -1),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def expected(params: SamplingParams) -> np.ndarray:
    """Probabilities by the documented steps, on full vectors, with a loop for top-p."""
    p = np.exp(LOGITS.astype(np.float64) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    if params.top_k:
        p[p < np.sort(p)[-params.top_k]] = 0
    p /= p.sum()
    kept = np.array([v if p[p > v].sum() < params.top_p - 1e-12 else 0 for v in p])
    return kept / kept.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.0, min_p=0.3),
        SamplingParams(temperature=1.3, top_k=5, top_p=0.8, min_p=0.05),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6),
    ],
)
def test_candidates_have_the_analytic_probabilities(params: SamplingParams) -> None:
    ids, weights = candidates(LOGITS, params)
    found = np.zeros(len(LOGITS))
    found[ids] = weights / weights.sum()
    want = expected(params)
    if params.top_k == 1:  # the two best are equal, and both stay
        assert ids.tolist() == [1, 3]
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert (found > 0).tolist() == (want > 0).tolist()


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(scale: float, share: float) -> None:
    rng = np.random.default_rng(2)
    # rounded, so that there are ties
    weights = np.exp(np.round(rng.normal(size=5000) * scale, 1))
    want, total = [], 0.0
    for i in sorted(range(5000), key=lambda i: (-weights[i], i)):
        if total >= share * weights.sum():
            break
        want.append(i)
        total += weights[i]
    found = nucleus(weights, share).tolist()
    assert found == [i for i in range(5000) if weights[i] >= weights[want[-1]]]


@pytest.mark.parametrize("size", [5, 64, 1000, 49152, 50001])
@pytest.mark.parametrize("count", [1, 4, 40, 300])
def test_the_most_probable_are_those_of_a_full_sort(size: int, count: int) -> None:
    """Among logits of few distinct values, so that the last place is shared, and with some that are ruled out."""
    logits = np.random.default_rng(size + count).integers(-300, 300, size).astype(np.float32)
    logits[::3] = -np.inf
    count = min(count, size - 1)
    ids, top = most_probable(logits, count)
    last = np.sort(logits)[-count]
    np.testing.assert_array_equal(ids, np.flatnonzero(logits >= last))
    assert top == logits.max()


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.9, top_k=5, top_p=0.95, seed=7)
    sampler = Sampler(params, [], len(LOGITS))
    draws = 20000
    counts = np.bincount([sampler.sample(LOGITS, position) for position in range(draws)], minlength=len(LOGITS))
    want = expected(params) * draws
    assert not counts[want == 0].any()
    chi2 = ((counts - want) ** 2)[want > 0] / want[want > 0]
    # 99.99th percentile of chi-squared with 4 degrees of freedom
    assert chi2.sum() < 23.5


def test_uniform_depends_on_seed_stream_and_position_only() -> None:
    values = {(s, t, p): uniform(s, t, p) for s in (0, 1, 2**64 - 1) for t in (0, 1) for p in (0, 1, 5)}
    assert len(set(values.values())) == len(values)
    assert uniform(1, 1, 5) == values[1, 1, 5]
    numbers = np.array([uniform(3, 0, p) for p in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05


def test_penalties_match_the_direct_formula() -> None:
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3)
    prompt = [0, 2]
    sampler = Sampler(params, prompt, len(LOGITS))
    output: list[int] = []
    before = LOGITS.copy()
    for position in range(12):
        want = LOGITS.astype(np.float64)
        for token in {*prompt, *output}:
            want[token] = want[token] / 1.7 if want[token] > 0 else want[token] * 1.7
        for token in set(output):
            want[token] -= 0.4 + 0.3 * output.count(token)
        token = sampler.sample(LOGITS, position)
        assert token == int(want.astype(np.float32).argmax()), (position, want)
        output.append(token)
    assert len(set(output)) > 3
    np.testing.assert_array_equal(LOGITS, before)


def test_greedy_takes_the_lowest_of_equal_tokens_and_needs_no_seed() -> None:
    assert Sampler(SamplingParams(), [], len(LOGITS)).sample(LOGITS, 0) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_logits_that_are_not_finite_are_reported(value: float, how: dict[str, Any]) -> None:
    bad = LOGITS.copy()
    bad[3] = value
    with np.errstate(all="ignore"), pytest.raises(InternalError, match="position 9"):
        Sampler(SamplingParams(**how), [], len(LOGITS)).sample(bad, 9)


def test_log_softmax_is_normalized_far_from_zero() -> None:
    x = np.array([[1000.0, 1001.0, 990.0], [-5.0, -5.0, -5.0]], np.float32)
    y = log_softmax(x).astype(np.float64)
    np.testing.assert_allclose(np.exp(y).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(y[1], -math.log(3), rtol=1e-6)
