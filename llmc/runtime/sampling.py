"""What a caller may ask of sampling, and the sampler that does it.

The steps, in order, as in vLLM: repetition penalty, presence and frequency penalties, temperature, min-p, top-k, top-p, draw.
Temperature 0 takes the most probable token after the penalties. Log-probabilities are those of the model itself, before
any of these steps.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llmc.errors import InternalError, RequestError
from llmc.runtime.draws import MOST, pack, token_counts

_HEAD = 1024
_STRIDE = 32


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Wrong values raise RequestError on construction."""

    max_tokens: int | None = 256
    """The most tokens to generate; None goes on until the model stops or the context is full."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token every time (greedy)."""
    top_k: int = 0
    """Draw from the k most probable tokens, and those as probable as the last of them; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to this (Holtzman et al., 2020), and those as probable as the last
    of them."""
    min_p: float = 0.0
    """Leave out tokens less probable than this times the most probable one (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in the prompt or the output (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token in the output (OpenAI's definition), -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit as often as the token is in the output (OpenAI's definition), -2 to 2."""
    seed: int | None = None
    """The same seed gives the same text, whatever else is in the batch; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; a single string will do."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many most probable tokens; None reports nothing."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""

    def __post_init__(self) -> None:
        stop: Iterable[str] = (self.stop,) if isinstance(self.stop, str) else (self.stop or ())
        object.__setattr__(self, "stop", tuple(stop))
        self._integer("max_tokens", 1, None, optional=True)
        self._number("temperature", 0.0, math.inf)
        self._integer("top_k", 0, None)
        self._number("top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p=0 leaves no token to draw: it must be more than 0 and at most 1")
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, math.inf)
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty=0 cannot be: it must be more than 0, and 1 is no penalty")
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._integer("seed", 0, 2**64 - 1, optional=True)
        self._integer("logprobs", 0, None, optional=True)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError(f"stop={list(self.stop)!r} cannot be: it must be strings that are not empty")

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on how often it came before."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def _integer(self, name: str, low: int, high: int | None, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low or (high is not None and value > high):
            wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
            raise RequestError(f"{name}={value!r} cannot be: it must be {wanted}{' or None' if optional else ''}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or not low <= value <= high:
            wanted = f"a number of at least {low:g}" if math.isinf(high) else f"a number from {low:g} to {high:g}"
            raise RequestError(f"{name}={value!r} cannot be: it must be {wanted}")


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: Philox4x64-10 (Salmon et al., 2011) with key
    ``(seed, stream)`` and counter ``position``."""
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array([position, 0, 0, 0], np.uint64)).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def not_finite(position: int) -> InternalError:
    """The error for logits of which none is the largest."""
    return InternalError(f"the model gave logits that are not finite for position {position}: please report the model")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities over the last axis, float32 in and out, summed in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


class Sampler:
    """Chooses the tokens of one sequence. ``stream`` tells apart the samples that share a prompt and a seed.

    A device that chooses instead is told how by :meth:`record`, and its tokens are made known by :meth:`note`. ``counts`` (int16
    [vocab], see :mod:`llmc.runtime.draws`; None without penalties) are of the prompt and of the ``chosen`` tokens so far.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, stream: int = 0) -> None:
        self._params = params
        self._stream = stream
        self._seed = secrets.randbits(64) if params.seed is None else int(params.seed)
        self.chosen = 0
        self.counts = token_counts(vocab_size, prompt, []) if params.penalizes else None

    def sample(self, logits: np.ndarray, position: int) -> int:
        """The token at ``position`` of the sequence, given its ``logits`` [vocab] float32, which are left as they are."""
        logits = self._penalized(logits)
        if self._params.temperature == 0:
            token = int(logits.argmax())  # NumPy takes NaN for the largest
            finite = bool(np.isfinite(logits[token]))
        else:
            token, finite = self._draw(logits, position)
        if not finite:
            raise not_finite(position)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """``token`` was chosen."""
        self.chosen += 1
        if self.counts is not None and self.counts[token] & MOST < MOST:
            self.counts[token] += 1

    def record(self, slot: int, row: int) -> np.ndarray:
        """How the next token is to be chosen: see :func:`llmc.runtime.draws.pack`."""
        return pack(self._params, self._seed, self._stream, slot, row)

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        p = self._params
        if self.counts is None:
            return logits
        scaled = np.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
        logits = np.where(self.counts != 0, scaled, logits)
        generated = self.counts & MOST
        penalized: np.ndarray = logits - p.presence_penalty * (generated > 0) - p.frequency_penalty * generated
        return penalized.astype(np.float32)

    def _draw(self, logits: np.ndarray, position: int) -> tuple[int, bool]:
        """A token, and whether the logits have a finite largest one (without one the token is any)."""
        ids, weights = candidates(logits, self._params)
        total = np.cumsum(weights, dtype=np.float64)
        # in the order of token ids, where rounding in the logits moves the bounds least
        place = np.searchsorted(total, uniform(self._seed, self._stream, position) * total[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)]), bool(total[-1] > 0)


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, in ascending order, and their weights (float32, the largest 1, not normalized).

    They are all those at least as probable as some token: which of equals are kept depends on no order, so that another sampler
    finds the same ones by a threshold. Temperature must not be 0. At least the most probable token remains. Where the largest logit
    is not finite there is one token, of weight NaN.
    """
    if 0 < params.top_k < logits.size:
        ids, top = most_probable(logits, params.top_k)
        logits = logits[ids]
    else:
        ids, top = np.arange(logits.size), logits.max()
    if not np.isfinite(top):
        return np.zeros(1, np.int64), np.full(1, np.nan, np.float32)
    weights = np.exp((logits - top) / np.float32(params.temperature))
    if params.min_p > 0:
        # the most probable token survives top-k, so the order of the two does not matter
        kept = np.flatnonzero(weights >= params.min_p)
        ids, weights = ids[kept], weights[kept]
    if params.top_p < 1:
        kept = nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def most_probable(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.float32]:
    """Indices, ascending, of the ``count`` largest logits and of those equal to the last; the largest (NaN if there is one).

    The vocabulary is read once, for the maxima of its strides: ``count`` of these are bounds from below for as many elements, so
    only strides whose maximum reaches the last of them can hold one that is asked for.
    """
    strides = logits.size // _STRIDE
    whole = strides * _STRIDE
    if strides < 2 * count:
        strides, whole = logits.size, logits.size
    table = logits[:whole].reshape(-1, strides)
    maxima = table.max(axis=0)
    top = np.maximum(maxima.max(), logits[whole:].max(initial=-np.inf))
    kept = np.flatnonzero(maxima >= np.partition(maxima, -count)[-count])
    ids = np.concatenate([np.add.outer(np.arange(len(table)) * strides, kept).ravel(), np.arange(whole, logits.size)])
    found = logits[ids]
    if len(ids) >= count:  # fewer with NaN among them
        ids = ids[found >= np.partition(found, -count)[-count]]
    return np.sort(ids), top


def nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """Indices, ascending, of the fewest largest ``weights`` that add up to ``share`` of their sum, and of those equal to the
    last."""
    limit = share * weights.sum(dtype=np.float64)
    head, count = np.arange(weights.size), _HEAD
    while count < weights.size:
        # sorting a whole vocabulary takes milliseconds, and the nucleus is nearly always among the largest few
        large = np.flatnonzero(weights >= np.partition(weights, -count)[-count])
        if weights[large].sum(dtype=np.float64) >= limit:
            head = large
            break
        count *= 8
    order = head[np.argsort(-weights[head], kind="stable")]
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    return np.flatnonzero(weights >= weights[order[before < limit][-1]])
