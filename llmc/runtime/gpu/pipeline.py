"""Choose tokens on the GPU and run ahead of the host: the :class:`~llmc.runtime.executor.Pipeline` of a GPU's executor.

A decode step here is ``decode``, ``sample`` and ``advance`` (:mod:`llmc.manifest`), one CUDA graph for each batch size: it leaves
the arrays of the next step behind it. So the host may start several in a row. Each step's tokens are copied to a pinned slot of
their own with an event behind them; reading one waits for that event and nothing later. Everything is in one stream: pages
that the host gives to another sequence are written by later steps than those still in flight.

While steps are in flight a sequence can outgrow its pages: the new entries of the block table go to the device between two steps. A
step finds the slot of the next one, so that a page has to be there a step before it is written to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmc.runtime.batch import Step
from llmc.runtime.draws import FIELDS
from llmc.runtime.executor import Draw
from llmc.runtime.sampling import Sampler

if TYPE_CHECKING:
    from llmc.runtime.gpu.executor import GpuExecutor

DEPTH = 3
"""Steps in flight: one runs, one waits behind it, and one more covers a host that is late."""

_ENTRIES = 4
"""New block table entries for each sequence that a step's slot has room for: a step needs at most one more page of each."""


@dataclass
class _Slot:
    """Where a step leaves its tokens: pinned memory, and the event after the copy. ``entries``: room for block table updates."""

    tokens: np.ndarray
    entries: np.ndarray
    event: int
    count: int = 0


class CudaPipeline:
    """See :class:`~llmc.runtime.executor.Pipeline`."""

    depth = DEPTH

    def __init__(self, executor: GpuExecutor, max_draws: int, vocab: int) -> None:
        """Raises InternalError if the device has no room for the token counts."""
        self.executor = executor
        self.max_draws = max_draws
        self.vocab = vocab
        self.cuda = executor.driver
        self.current: CudaFlight | None = None
        self._free: list[_Slot] = []
        self.tokens = self.cuda.allocate(4 * max_draws)
        self.counts = self.cuda.allocate(2 * max_draws * vocab, zero=True)
        # which sampler's counts a row of the device's holds, and how many of its tokens they have seen
        self._held: list[tuple[Sampler, int] | None] = [None] * max_draws
        self._staged = self.cuda.pinned(2 * vocab).view(np.int16)
        self._staged_event = self.cuda.event()

    def begin(self, step: Step, draws: Sequence[Draw]) -> CudaFlight:
        """See :meth:`Pipeline.begin`."""
        decode = step.logit_rows is None
        flight = CudaFlight(self, step if decode else None, [d.sampler for d in draws])
        with self.cuda.turn():
            self.executor.put(step, self._records(draws), self._positions(step, draws))
            if decode:
                self.executor.step_on_device(len(draws))
            else:
                self.executor.extend_on_device(len(draws))
            self.current = flight if decode else None
            if draws:
                flight.finish_step()
        return flight

    def _positions(self, step: Step, draws: Sequence[Draw]) -> np.ndarray:
        """The position of the token that each draw chooses."""
        rows = np.array([d.row for d in draws], np.int64)
        wanted = rows if step.logit_rows is None else step.logit_rows[rows]
        return (step.positions[wanted] + 1).astype(np.int32)

    def _records(self, draws: Sequence[Draw]) -> np.ndarray:
        """The draws as the module takes them; the device holds the token counts that they need."""
        records = np.empty((len(draws), len(FIELDS)), np.int32)
        wanted = {id(d.sampler) for d in draws}
        for i, (sampler, row) in enumerate(draws):
            slot = -1 if sampler.counts is None else self._hold(sampler, wanted)
            records[i] = sampler.record(slot, row)
        return records

    def _hold(self, sampler: Sampler, wanted: set[int]) -> int:
        """The row of the device's token counts that is this sampler's, up to date. Rows of samplers in ``wanted`` stay."""
        slot = next((i for i, h in enumerate(self._held) if h is not None and h[0] is sampler), None)
        if slot is None:
            slot = next(i for i, h in enumerate(self._held) if h is None or id(h[0]) not in wanted)
        held = self._held[slot]
        if held is None or held[0] is not sampler or held[1] != sampler.chosen:
            assert sampler.counts is not None
            self.cuda.wait(self._staged_event)
            self._staged[:] = sampler.counts
            self.cuda.copy_in(self.counts + 2 * self.vocab * slot, self._staged)
            self.cuda.record(self._staged_event)
        self._held[slot] = (sampler, sampler.chosen)
        return slot

    def drew(self, samplers: Sequence[Sampler]) -> None:
        """The device has chosen, and counted, one token more of each."""
        chosen = {id(s) for s in samplers if s.counts is not None}
        if chosen:
            self._held = [h if h is None or id(h[0]) not in chosen else (h[0], h[1] + 1) for h in self._held]

    def take_slot(self) -> _Slot:
        """A slot that no step uses."""
        if self._free:
            return self._free.pop()
        entries = self.cuda.pinned(4 * _ENTRIES * self.max_draws).view(np.int32)
        return _Slot(self.cuda.pinned(4 * self.max_draws).view(np.int32), entries, self.cuda.event())

    def give_slot(self, slot: _Slot) -> None:
        """The slot's tokens have been read, or nobody will. A step that has yet to write them does so before the next user's."""
        self._free.append(slot)


class CudaFlight:
    """See :class:`~llmc.runtime.executor.Flight`. ``step``: the decode step it began with, None for an extend step."""

    def __init__(self, pipeline: CudaPipeline, step: Step | None, samplers: list[Sampler]) -> None:
        self._pipeline = pipeline
        self._samplers = samplers
        self._slots: deque[_Slot] = deque()
        # pages of each sequence that the device knows; from the one it writes to on none is shared, so that more can only follow
        self._known = [] if step is None else list(step.pages)
        # positions that it has, and so the next one that is written
        self._written: list[int] = [] if step is None else step.seq_lens.tolist()

    @property
    def in_flight(self) -> int:
        return len(self._slots)

    def again(self, tables: Sequence[Sequence[int]]) -> bool:
        """See :meth:`Flight.again`."""
        pipeline = self._pipeline
        page_size = pipeline.executor.page_size
        if pipeline.current is not self or any(w // page_size >= k for w, k in zip(self._written, self._known, strict=True)):
            return False  # or the last step did not know the page of this one's slot
        with pipeline.cuda.turn():
            slot = pipeline.take_slot()
            if not self._send(tables, slot):
                pipeline.give_slot(slot)
                return False
            pipeline.executor.step_on_device(len(self._samplers))
            self.finish_step(slot)
        self._written = [w + 1 for w in self._written]
        return True

    def _send(self, tables: Sequence[Sequence[int]], slot: _Slot) -> bool:
        """Copy the new entries of the block table. False if the slot has no room for them."""
        changes = [
            (row, known, pages[known:])
            for row, (pages, known) in enumerate(zip(tables, self._known, strict=True))
            if len(pages) > known
        ]
        if sum(len(new) for _, _, new in changes) > slot.entries.size:
            return False
        at = 0
        for row, first, new in changes:
            view = slot.entries[at : at + len(new)]
            view[:] = new
            self._pipeline.executor.put_table(row, first, view)
            self._known[row] += len(new)
            at += len(new)
        return True

    def finish_step(self, slot: _Slot | None = None) -> None:
        """Have the step's tokens copied out."""
        pipeline = self._pipeline
        slot = slot or pipeline.take_slot()
        slot.count = len(self._samplers)
        pipeline.cuda.copy_out(slot.tokens[: slot.count], pipeline.tokens)
        pipeline.cuda.record(slot.event)
        pipeline.drew(self._samplers)
        self._slots.append(slot)

    def collect(self) -> list[int]:
        """See :meth:`Flight.collect`."""
        slot = self._slots.popleft()
        self._pipeline.cuda.use()
        self._pipeline.cuda.wait(slot.event)
        found: list[int] = slot.tokens[: slot.count].tolist()
        self._pipeline.give_slot(slot)
        return found

    def abandon(self) -> None:
        """See :meth:`Flight.abandon`."""
        while self._slots:
            self._pipeline.give_slot(self._slots.popleft())
