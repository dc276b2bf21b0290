"""Two artifacts of one model, run in turns: what differs between them decides, and not what the machine does meanwhile.

``python -m llmc.tune.turns`` holds both and times short runs of one and the other, through :func:`llmc.load` and its scheduler, as
a user would run them; :class:`Turns` is the other end. The first message is ``{open: [folder, folder], tests: [[kind, rows,
context], ...]}``, after which ``{time: test, rounds: N}`` gives N pairs of seconds. Thin: what it needs is the runtime alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.tune.child import Child, ChildEnded, answer_all

CONTEXT = 64
"""Tokens of a prompt that a decode test starts from."""

STREAM = 768
"""Tokens that a sequence is continued by before it is begun anew."""

TURN = 0.12
"""Seconds of one run, about: long enough to time, short enough that the machine is the same for the other one."""

CHOSEN, READ = 8, 4
"""Tokens that each sequence of a test is continued by, and sequences whose tokens are then judged."""

DEFICIT = 0.5
"""How far below the best logit, in units of the row's root mean square, a chosen token may score: rounding is a tenth of it, and
what a kernel that computes something else chooses is several times as far below."""

OPENING, RUNNING = 900.0, 300.0
"""Seconds that loading two models and a few rounds of them may take."""


@dataclass(frozen=True)
class Workload:
    """What is run: ``decode``, steps of ``rows`` sequences that begin with ``context`` tokens each, or ``prefill``, a prompt of
    ``rows`` tokens up to the first one after it."""

    kind: str
    rows: int
    context: int = CONTEXT

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prompt of {self.rows}"
        return f"{self.rows} sequence{'s' * (self.rows > 1)}" + ("" if self.context == CONTEXT else f" of {self.context}")

    @property
    def tokens(self) -> int:
        """Positions that a sequence of it takes."""
        return self.rows + 1 if self.kind == "prefill" else self.context + STREAM

    @property
    def sequences(self) -> int:
        return 1 if self.kind == "prefill" else self.rows


class RunFailed(Exception):
    """A compiled model that does not run. The text says why."""


class Turns:
    """The process that runs two artifacts at a time. It is started again after one of them has ended it."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._open: tuple[Path, Path, tuple[Workload, ...]] | None = None

    def open(self, base: Path, rival: Path, tests: Sequence[Workload]) -> None:
        """Load both, for :meth:`pairs` of any of ``tests``. An artifact that was open before stays so. Raises RunFailed."""
        if self._open != (base, rival, tuple(tests)):
            self._open = None
            self._ask({"open": [str(base), str(rival)], "tests": [astuple(t) for t in tests]}, OPENING)
            self._open = base, rival, tuple(tests)

    def pairs(self, test: Workload, rounds: int) -> list[tuple[float, float]]:
        """Seconds of a step (of the prompt) of both, ``rounds`` times in turns. Raises RunFailed."""
        answer = self._ask({"time": astuple(test), "rounds": rounds}, RUNNING)
        return [(a, b) for a, b in answer["seconds"]]

    def _ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        self._child = self._child or Child("llmc.tune.turns")
        try:
            answer = self._child.ask(message, seconds)
        except ChildEnded as error:
            self._child = self._open = None
            raise RunFailed(str(error)) from None
        if "failed" in answer:
            raise RunFailed(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
        self._child = self._open = None


class _Subject:
    """A loaded model and the sequences that it is continuing."""

    def __init__(self, folder: Path, tests: Sequence[Workload]) -> None:
        import llmc
        from llmc.manifest import read

        m = read(folder)
        longest = min(max(t.tokens for t in tests), m.model.context)
        per_sequence = -(-longest // m.kv.page_size)
        pages = max(t.sequences * -(-min(t.tokens, longest) // m.kv.page_size) for t in tests)
        self.model = llmc.load(
            folder,
            context=longest,
            max_batch=min(max(t.sequences for t in tests), m.limits.max_batch),
            kv_memory=max(pages, per_sequence) * max(m.kv.page_bytes, 1),
        )
        self._stream: Iterator[Any] | None = None
        self._test: Workload | None = None
        self._left = 0

    def seconds(self, test: Workload, steps: int) -> float:
        """Of one step of ``steps``, or of the prompt."""
        if test.kind == "prefill":
            self._end()
            start = time.perf_counter()
            self.model.generate(self._ids(min(test.rows, self.model.context - 1), 0), max_tokens=1, ignore_eos=True)
            return time.perf_counter() - start
        if test != self._test or self._left < steps + 1:
            self._begin(test)
            steps = max(1, min(steps, self._left - 1))  # a small context has no more
        assert self._stream is not None
        self._step(test)  # what the other one left to do is done then
        start = time.perf_counter()
        for _ in range(steps):
            self._step(test)
        return (time.perf_counter() - start) / steps

    def misread(self, rival: _Subject, test: Workload) -> int:
        """Tokens that ``rival`` chooses in a run of ``test`` and that this model's logits of the same text speak against."""
        self._end()
        rival._end()
        context = min(test.rows if test.kind == "prefill" else test.context, self.model.context // 2)
        prompts = [self._ids(context, i) for i in range(test.sequences)]
        most = min(CHOSEN, self.model.context - context)
        found = rival.model.generate(prompts, max_tokens=most, ignore_eos=True)
        wrong = 0
        for i in range(0, len(prompts), -(-len(prompts) // READ)):
            logits = np.asarray(self.model.logits(prompts[i] + found[i].token_ids[:-1])[context - 1 :], np.float64)
            chosen = logits[np.arange(len(logits)), found[i].token_ids]
            wrong += int((logits.max(-1) - chosen > DEFICIT * np.sqrt((logits**2).mean(-1))).sum())
        return wrong

    def _begin(self, test: Workload) -> None:
        self._end()
        context = min(test.context, self.model.context // 2)
        self._left = min(STREAM, self.model.context - context) - 1
        prompts = [self._ids(context, i) for i in range(test.rows)]
        self._stream = self.model.generate(prompts, max_tokens=self._left + 1, ignore_eos=True, stream=True)
        self._test = test
        waiting = set(range(test.rows))
        while waiting:  # all are decoding once the last one has its first token
            waiting.discard(next(self._stream).index)
        self._left -= test.rows  # the first sequence may be so many tokens ahead of the last

    def _step(self, test: Workload) -> None:
        assert self._stream is not None
        for _ in range(test.rows):
            next(self._stream)
        self._left -= 1

    def _ids(self, count: int, seed: int) -> list[int]:
        """A prompt, the same in both artifacts and unlike those of other seeds."""
        vocab = self.model.manifest.model.vocab_size
        return [(7919 * (seed + 1) + 31 * i * i + i) % vocab for i in range(count)]

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]  # a generator
        self._stream = self._test = None

    def close(self) -> None:
        self._end()
        self.model.close()


class _Server:
    def __init__(self) -> None:
        self.subjects: dict[str, _Subject] = {}
        self.tests: Any = None
        self.pair: list[_Subject] = []
        self.steps: dict[Workload, int] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if "open" in message:
                self._load(message["open"], message["tests"])
                return {}
            test = Workload(*message["time"])
            return {"seconds": [self._round(test) for _ in range(message["rounds"])]}
        except Exception as error:  # a model may fail in any way
            lines = str(error).strip().splitlines() or [""]
            return {"failed": f"{type(error).__name__}: {lines[-1][:300]}"}

    def _load(self, folders: list[str], tests: list[Any]) -> None:
        keep = folders if tests == self.tests else []
        for name in [n for n in self.subjects if n not in keep]:
            self.subjects.pop(name).close()
        self.tests, self.steps = tests, {}
        for name in folders:
            if name not in self.subjects:
                self.subjects[name] = _Subject(Path(name), [Workload(*t) for t in tests])
        self.pair = [self.subjects[name] for name in folders]

    def _round(self, test: Workload) -> list[float]:
        if test not in self.steps:
            base, rival = self.pair
            if wrong := base.misread(rival, test):
                raise ValueError(f"at {test} {wrong} tokens are not what the model says: a kernel computes something else")
            for subject in self.pair:  # the first runs allocate, and on a GPU record graphs
                subject.seconds(test, 4)
            slower = max(subject.seconds(test, 4) for subject in self.pair)
            self.steps[test] = min(64, max(3, round(TURN / slower)))
        return [subject.seconds(test, self.steps[test]) for subject in self.pair]


if __name__ == "__main__":
    answer_all(_Server().answer)
