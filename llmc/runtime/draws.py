"""How a token is to be chosen, as the compiled module takes it: one record of int32 for each draw.

The record is what :class:`~llmc.runtime.sampling.SamplingParams` says, with floats as their bits, so that one kernel serves a batch
in which every row asks for something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmc.runtime.sampling import SamplingParams

FIELDS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "top_k", "seed_low", "seed_high", "stream", "slot", "row",
)  # fmt: skip
"""The columns of a record. ``slot``: the row of the token counts that penalties read, -1 for none; ``row``: that of the logits."""

FLOATS = 6
"""So many of them, the first ones, are float32."""

FIELD = {name: i for i, name in enumerate(FIELDS)}

IN_PROMPT = -0x8000
"""The sign bit of a token count (int16): the token is in the prompt. The other 15 bits say how often it was generated."""

MOST = 0x7FFF
"""Token counts stop here."""


def pack(params: SamplingParams, seed: int, stream: int, slot: int, row: int) -> np.ndarray:
    """The record: int32 [len(FIELDS)]. ``seed`` is the one that is used, also where ``params`` leave it open."""
    record = np.empty(len(FIELDS), np.int32)
    record[:FLOATS].view(np.float32)[:] = [getattr(params, name) for name in FIELDS[:FLOATS]]
    unsigned = record[FLOATS:].view(np.uint32)
    # more than any vocabulary is the same as all of it
    unsigned[:4] = min(params.top_k, 0x7FFFFFFF), seed & 0xFFFFFFFF, seed >> 32, stream
    record[FIELD["slot"]], record[FIELD["row"]] = slot, row
    return record


def token_counts(vocab_size: int, prompt: list[int], generated: list[int]) -> np.ndarray:
    """What penalties need to know of a sequence: int16 [vocab_size], see ``IN_PROMPT``."""
    counts = np.minimum(np.bincount(generated, minlength=vocab_size), MOST).astype(np.int16)
    counts[prompt] |= np.int16(IN_PROMPT)
    return counts
