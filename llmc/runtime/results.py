"""What generation gives back: events while it runs, completions when it is done, scores of given text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability under the model, and those of the most probable tokens, most probable first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Event:
    """One generated token. ``index`` says of which prompt, ``sample`` of which of its parallel samples.

    ``text`` is what became certain with it: it may be empty (an unfinished character, the start of a stop string) and holds
    whole characters only. ``finish_reason`` is set on a sample's last event: ``"stop"`` (end-of-sequence token or stop string)
    or ``"length"`` (``max_tokens`` or the context is used up). ``timing`` comes with it.
    """

    index: int
    sample: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_tokens: int = 0
    timing: Timing | None = None


@dataclass(frozen=True)
class Timing:
    """``prompt``: seconds from the first step of the prompt to the first token; ``first_token``: seconds from the request to it;
    ``tokens_per_second``: of the tokens after the first, 0 if there was one only."""

    prompt: float
    first_token: float
    tokens_per_second: float


@dataclass
class Completion:
    """The continuation of one prompt. ``token_ids`` holds every token generated, an end-of-sequence token among them;
    ``text`` ends before that, and before a stop string."""

    index: int
    sample: int
    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    timing: Timing | None = None

    def add(self, event: Event) -> None:
        """Append what ``event`` of the same sample brought."""
        self.prompt_tokens = event.prompt_tokens
        self.token_ids += event.token_ids
        self.text += event.text
        self.finish_reason = event.finish_reason
        self.timing = event.timing
        if event.logprobs is not None:
            self.logprobs = (self.logprobs or []) + event.logprobs


@dataclass(frozen=True)
class Score:
    """How probable the model finds a text. ``logprobs[i]`` (natural) is that of ``token_ids[i + 1]`` given those before it."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The log-probability of the whole text but its first token."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-self.total / len(self.logprobs))
