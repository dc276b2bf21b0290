"""Which samples run in the next step: ragged continuous batching (Yu et al., 2022, "Orca") with chunked prompts.

A step takes every running sample's pending tokens, those that have one first, until the row limit is reached: a long
prompt goes in chunks, beside the samples that are decoding. Samples wait while the batch or the KV cache is full. If the
cache fills up in between, the sample that came last gives up its pages and runs its tokens anew later.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter

from llmc.manifest import Limits
from llmc.runtime.batch import Chunk, build_step
from llmc.runtime.executor import Executor
from llmc.runtime.generation import Bounds, Generation, Request
from llmc.runtime.pages import OutOfPagesError, PageAllocator
from llmc.runtime.results import Event
from llmc.runtime.tokenizer import Tokenizer


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

    @property
    def unfinished(self) -> int:
        """Samples that have not ended yet, as far as their prompts have been run."""
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(Generation.first(request, self._allocator, self._bounds, self._tokenizer))

    def step(self) -> list[Event]:
        """Run the model once; the tokens it gave. Nothing happens if nothing is unfinished.

        Raises OutOfPagesError if not even one sample fits into the KV cache.
        """
        self._admit()
        plan = self._plan()
        if not plan:
            return []
        chunks = [Chunk(g.sequence, rows, int(rows == g.sequence.pending)) for g, rows in plan]
        logits = self._executor.run(build_step(chunks))
        for generation, rows in plan:
            generation.sequence.table.advance(rows)
        events = []
        done = [g for (g, _), chunk in zip(plan, chunks, strict=True) if chunk.logits]
        for row, generation in enumerate(done):
            # the other samples of the request start here, from the same logits
            twins = generation.fork()
            self._waiting.extendleft(reversed(twins))
            for sample in (generation, *twins):
                event = sample.accept(logits[row])
                events.append(event)
                if event.finish_reason is not None:
                    self._remove(sample)
        return events

    def close(self) -> None:
        """End everything; every page is free again."""
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
        while self._waiting and len(self._running) < self._limits.max_batch:
            sequence = self._waiting[0].sequence
            # one page more than the tokens fill: a shared page may have to be copied
            need = self._allocator.pages_for(len(sequence.tokens)) - len(sequence.table.pages) + 1
            if self._running and need > self._allocator.free:
                return
            generation = self._waiting.popleft()
            if generation.started is None:
                generation.started = perf_counter()
            self._running.append(generation)

    def _plan(self) -> list[tuple[Generation, int]]:
        """The samples of the next step with their rows, whose pages are reserved."""
        order = sorted(self._running, key=lambda g: g.sequence.pending > 1)
        if all(g.sequence.pending == 1 for g in order):
            rows_left = logits_left = self._limits.max_batch
        else:
            rows_left, logits_left = self._limits.max_rows, self._limits.max_logit_rows
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
