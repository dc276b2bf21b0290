"""Which samples run in the next step: ragged continuous batching (Yu et al., 2022, "Orca") with chunked prompts.

A step takes every running sample's pending tokens, those that have one first, until the row limit is reached: a long
prompt goes in chunks, beside the samples that are decoding, which wait no longer than for :data:`ROWS_BESIDE`. Samples wait
while the batch or the KV cache is full. If the cache fills up in between, the sample that came last gives up its pages and
runs its tokens anew later.

Where the device chooses tokens (:class:`~llmc.runtime.executor.Pipeline`), a decode step is followed by more of the same samples
that are started before its tokens are read. That ends where a sample ends, another may join, or pages run out: what is in
flight is read to its end, tokens of samples that have ended are dropped, and the next step is planned anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

from llmc.errors import InternalError
from llmc.manifest import Limits
from llmc.runtime.batch import Chunk, Step, build_step
from llmc.runtime.executor import Draw, Executor, Flight, Pipeline
from llmc.runtime.generation import Bounds, Generation, Request
from llmc.runtime.pages import BlockTable, OutOfPagesError, PageAllocator
from llmc.runtime.results import Event
from llmc.runtime.tokenizer import Tokenizer

ROWS_BESIDE = 4096
"""Most rows of a step in which a sample decodes."""


@dataclass
class _Ahead:
    """Decode steps of the same samples, some of them in flight. ``last``: no more are started."""

    flight: Flight
    samples: list[Generation]
    depth: int
    last: bool = False


class Scheduler:
    """Runs requests to their ends over an executor and a page allocator, which other schedulers may use in turn."""

    def __init__(
        self, executor: Executor, allocator: PageAllocator, limits: Limits, bounds: Bounds, tokenizer: Tokenizer | None
    ) -> None:
        self._executor = executor
        self._allocator = allocator
        self._limits = limits
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._ahead: _Ahead | None = None

    @property
    def unfinished(self) -> int:
        """Samples that have not ended yet, as far as their prompts have been run."""
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(Generation.first(request, self._allocator, self._bounds, self._tokenizer))

    def step(self) -> list[Event]:
        """Run the model once; the tokens it gave. Nothing happens if nothing is unfinished.

        Raises OutOfPagesError if not even one sample fits into the KV cache, InternalError if logits are not finite.
        """
        try:
            return self._step()
        except InternalError:
            clear_pages(self._executor, [g.sequence.table for g in self._running])
            raise

    def _step(self) -> list[Event]:
        if self._ahead is not None:
            return self._follow(self._ahead)
        self._admit()
        plan = self._plan()
        if not plan:
            return []
        pipeline = self._executor.pipeline
        if pipeline is not None and all(g.sequence.pending == 1 for g, _ in plan):
            with suppress(OutOfPagesError):  # the first of them is all that follows then
                self._reserve_ahead([g for g, _ in plan])
        chunks = [Chunk(g.sequence, rows, int(rows == g.sequence.pending)) for g, rows in plan]
        done = [g for (g, _), chunk in zip(plan, chunks, strict=True) if chunk.logits]
        step = build_step(chunks)
        if pipeline is not None and self._on_device(pipeline, step, done):
            return self._start(pipeline, step, plan, done)
        logits = self._executor.run(step)
        for generation, rows in plan:
            generation.sequence.table.advance(rows)
        events = []
        for row, generation in enumerate(done):
            for sample in self._samples(generation):
                events.append(self._told(sample, sample.accept(logits[row])))
        return events

    def _samples(self, generation: Generation) -> list[Generation]:
        """A sample whose prompt has been run, and the request's others, which start here from the same logits."""
        twins = generation.fork()
        self._waiting.extendleft(reversed(twins))
        return [generation, *twins]

    def _told(self, generation: Generation, event: Event) -> Event:
        """The event of a sample's next token, which may have been its last."""
        if event.finish_reason is not None:
            self._remove(generation)
        return event

    @staticmethod
    def _on_device(pipeline: Pipeline, step: Step, done: list[Generation]) -> bool:
        """Whether the device can choose the next tokens of these samples. In a decode step it chooses one for each row."""
        draws = sum(1 if g.forked else g.request.samples for g in done)
        most = pipeline.max_draws if step.logit_rows is not None else len(done)
        return draws <= most and not any(g.needs_logits for g in done)

    def _start(self, pipeline: Pipeline, step: Step, plan: list[tuple[Generation, int]], done: list[Generation]) -> list[Event]:
        """Run a planned step whose tokens the device chooses; a decode step may have others follow it."""
        for generation, rows in plan:
            generation.sequence.table.advance(rows)
        drawn = [(row, sample) for row, generation in enumerate(done) for sample in self._samples(generation)]
        flight = pipeline.begin(step, [Draw(sample.sampler, row) for row, sample in drawn])
        samples = [sample for _, sample in drawn]
        if step.logit_rows is None:
            self._ahead = _Ahead(flight, samples, pipeline.depth)
            return self._follow(self._ahead)
        if not samples:
            return []
        return [self._told(s, s.accept_token(t)) for s, t in zip(samples, flight.collect(), strict=True)]

    def _follow(self, ahead: _Ahead) -> list[Event]:
        """Start steps as far ahead as is worth it, and read the tokens of the oldest one."""
        while not ahead.last and ahead.flight.in_flight < ahead.depth:
            ahead.last = not self._again(ahead)
        tokens = ahead.flight.collect()
        events = []
        for sample, token in zip(ahead.samples, tokens, strict=True):
            if sample.finished:
                continue  # it ended while this step was in flight
            events.append(self._told(sample, sample.accept_token(token)))
            ahead.last |= events[-1].finish_reason is not None
        if not ahead.flight.in_flight and ahead.last:
            self._ahead = None
        return events

    def _again(self, ahead: _Ahead) -> bool:
        """Start one more step of the same samples. False if there is a reason to plan anew."""
        if self._admissible() or any(s.room <= ahead.flight.in_flight for s in ahead.samples):
            return False
        tables = [s.sequence.table for s in ahead.samples]
        try:
            self._reserve_ahead(ahead.samples)
        except OutOfPagesError:
            return False
        if not ahead.flight.again([table.pages for table in tables]):
            return False
        for table in tables:
            table.advance(1)
        return True

    def _reserve_ahead(self, samples: list[Generation]) -> None:
        """Reserve the next position of each sample, and the one after it, whose slot the device finds in the same step. Raises
        OutOfPagesError, with the pages of some reserved."""
        for sample in samples:
            table = sample.sequence.table
            table.reserve(min(2, self._bounds.context - table.length), self._executor.copy_page)

    def close(self) -> None:
        """End everything; every page is free again."""
        if self._ahead is not None:
            self._ahead.flight.abandon()
            self._ahead = None
        for generation in (*self._running, *self._waiting):
            generation.sequence.table.release()
        self._running.clear()
        self._waiting.clear()

    def _remove(self, generation: Generation) -> None:
        generation.sequence.table.release()
        if generation in self._running:
            self._running.remove(generation)
        else:
            self._waiting.remove(generation)

    def _admit(self) -> None:
        """Let waiting samples run, first come first served, as long as the batch and the free pages allow."""
        while self._admissible():
            generation = self._waiting.popleft()
            if generation.started is None:
                generation.started = perf_counter()
            self._running.append(generation)

    def _admissible(self) -> bool:
        """Whether the first waiting sample may run."""
        if not self._waiting or len(self._running) >= self._limits.max_batch:
            return False
        sequence = self._waiting[0].sequence
        # one page more than the tokens fill: a shared page may have to be copied
        need = self._allocator.pages_for(len(sequence.tokens)) - len(sequence.table.pages) + 1
        return not self._running or need <= self._allocator.free

    def _plan(self) -> list[tuple[Generation, int]]:
        """The samples of the next step with their rows, whose pages are reserved."""
        order = sorted(self._running, key=lambda g: g.sequence.pending > 1)
        if all(g.sequence.pending == 1 for g in order):
            rows_left = logits_left = self._limits.max_batch
        else:
            rows_left, logits_left = self._limits.max_rows, self._limits.max_logit_rows
            if order[0].sequence.pending == 1:
                rows_left = min(rows_left, ROWS_BESIDE)
        plan: list[tuple[Generation, int]] = []
        for generation in order:
            rows = min(generation.sequence.pending, rows_left)
            ends = rows == generation.sequence.pending
            if generation not in self._running or rows == 0 or (ends and logits_left == 0):
                continue
            if not self._reserve(generation, rows):
                continue
            plan.append((generation, rows))
            rows_left -= rows
            logits_left -= ends
        # a reservation may have taken the pages of a sample planned before it
        return [(g, rows) for g, rows in plan if g in self._running]

    def _reserve(self, generation: Generation, rows: int) -> bool:
        """Reserve pages for the next rows, taking them from samples that came later. False if ``generation`` itself gave way."""
        while True:
            try:
                generation.sequence.table.reserve(rows, self._executor.copy_page)
            except OutOfPagesError:
                if not self._preempt(generation):
                    raise
                if generation not in self._running:
                    return False
            else:
                return True

    def _preempt(self, asking: Generation) -> bool:
        """Take the pages of the sample that came last, or make ``asking`` wait if that is the one. False if it is alone."""
        later = self._running[self._running.index(asking) + 1 :]
        last = next((g for g in reversed((*later, *self._waiting)) if g.sequence.table.pages), asking)
        if last is asking and self._running[0] is asking:
            return False
        last.sequence.table.release()
        if last in self._running:
            self._running.remove(last)
            self._waiting.appendleft(last)
        return True


def clear_pages(executor: Executor, tables: Iterable[BlockTable]) -> None:
    """Leave nothing of sequences whose numbers may not be finite in the pages that the next ones get."""
    with suppress(InternalError):  # a device that fails does not say more than the error that is on its way
        for page in {page for table in tables for page in table.pages}:
            executor.clear_page(page)
