"""One sample being generated: its sequence, how its tokens are chosen, and when it ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from llmc.runtime.detokenizer import Detokenizer, StopStrings
from llmc.runtime.pages import PageAllocator
from llmc.runtime.results import Event, FinishReason, Timing, TokenLogprob
from llmc.runtime.sampling import Sampler, SamplingParams, log_softmax, not_finite
from llmc.runtime.sequence import Sequence
from llmc.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt to continue ``samples`` times. ``index`` is the caller's number for it, repeated in its events."""

    prompt: list[int]
    params: SamplingParams
    index: int = 0
    samples: int = 1


@dataclass(frozen=True)
class Bounds:
    """What ends a sample whatever it asks for: the context in tokens, and the ids that mean the end."""

    context: int
    vocab_size: int
    eos_ids: frozenset[int]


class Generation:
    """A sample of a request. Its tokens are the prompt's and those chosen so far."""

    def __init__(
        self, request: Request, sequence: Sequence, bounds: Bounds, tokenizer: Tokenizer | None, sample: int, submitted: float
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.sample = sample
        self.forked = sample > 0 or request.samples == 1
        self.started: float | None = None
        self.finished = False
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._submitted = submitted
        self.sampler = Sampler(request.params, request.prompt, bounds.vocab_size, stream=sample)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(request.params.stop)
        self._first = 0.0

    @classmethod
    def first(cls, request: Request, allocator: PageAllocator, bounds: Bounds, tokenizer: Tokenizer | None) -> Generation:
        """The request's first sample, which runs the prompt."""
        return cls(request, Sequence(request.prompt, allocator), bounds, tokenizer, 0, perf_counter())

    def fork(self) -> list[Generation]:
        """The request's other samples, sharing the pages of the prompt, which has been run. Empty the second time."""
        if self.forked:
            return []
        self.forked = True
        twins = []
        for sample in range(1, self.request.samples):
            twin = Generation(self.request, self.sequence.fork(), self._bounds, self._tokenizer, sample, self._submitted)
            twin.started = self.started
            twins.append(twin)
        return twins

    @property
    def needs_logits(self) -> bool:
        """Whether the host must see the logits, and not only the token."""
        return self.request.params.logprobs is not None

    @property
    def room(self) -> int:
        """Tokens it may still get before its length ends it."""
        most = self._bounds.context - len(self.sequence.tokens)
        limit = self.request.params.max_tokens
        return most if limit is None else min(most, limit - (len(self.sequence.tokens) - len(self.request.prompt)))

    def accept(self, logits: np.ndarray) -> Event:
        """Choose the next token from ``logits`` [vocab] float32; the event that tells of it."""
        count = self.request.params.logprobs
        token = self.sampler.sample(logits, len(self.sequence.tokens))
        return self._append(token, None if count is None else [_logprob(logits, token, count)])

    def accept_token(self, token: int) -> Event:
        """The next token was chosen by the device (-1: it found none); the event that tells of it."""
        if token < 0:
            raise not_finite(len(self.sequence.tokens))
        self.sampler.note(token)
        return self._append(token, None)

    def _append(self, token: int, logprobs: list[TokenLogprob] | None) -> Event:
        params, tokens = self.request.params, self.sequence.tokens
        now = perf_counter()
        tokens.append(token)
        generated = len(tokens) - len(self.request.prompt)
        if generated == 1:
            self._first = now
        text, reason = self._advance_text(token, params)
        if reason is None and (len(tokens) >= self._bounds.context or generated == params.max_tokens):
            reason = "length"
            text += self._stops.flush()
        self.finished = reason is not None
        return Event(
            index=self.request.index,
            sample=self.sample,
            token_ids=[token],
            text=text,
            finish_reason=reason,
            logprobs=logprobs,
            prompt_tokens=len(self.request.prompt),
            timing=None if reason is None else self._timing(generated, now),
        )

    def _advance_text(self, token: int, params: SamplingParams) -> tuple[str, FinishReason | None]:
        if token in self._bounds.eos_ids and not params.ignore_eos:
            return self._stops.flush(), "stop"
        if self._detokenizer is None:
            return "", None
        text, found = self._stops.push(self._detokenizer.push(token))
        return text, "stop" if found else None

    def _timing(self, generated: int, now: float) -> Timing:
        started = self._submitted if self.started is None else self.started
        later = now - self._first
        return Timing(
            prompt=self._first - started,
            first_token=self._first - self._submitted,
            tokens_per_second=(generated - 1) / later if generated > 1 and later > 0 else 0.0,
        )


def _logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """The model's own log-probabilities: before penalties and temperature. Ties go to the lower id."""
    values = log_softmax(logits)
    count = min(count, values.size)
    top: Collection[int] = ()
    if count:
        # the count-th largest value bounds the candidates, however many share it
        bound = np.partition(values, -count)[-count]
        at_least = np.flatnonzero(values >= bound)
        top = at_least[np.argsort(-values[at_least], kind="stable")][:count].tolist()
    return TokenLogprob(token, float(values[token]), [(i, float(values[i])) for i in top])
