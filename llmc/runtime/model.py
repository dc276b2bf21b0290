"""A loaded model: generate, score, logits. What ``llmc.load`` returns."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmc.errors import RequestError
from llmc.manifest import Limits, Manifest
from llmc.runtime.batch import Chunk, build_step
from llmc.runtime.executor import Executor
from llmc.runtime.generation import Bounds, Request
from llmc.runtime.pages import PageAllocator
from llmc.runtime.results import Completion, Event, Score
from llmc.runtime.sampling import SamplingParams, log_softmax
from llmc.runtime.scheduler import Scheduler, clear_pages
from llmc.runtime.sequence import Sequence as TokenSequence
from llmc.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | np.ndarray
"""Text, token ids, or chat messages."""


class Model:
    """A model that is ready to run. One call at a time computes; several generators may be open at once and share the KV cache."""

    def __init__(
        self, manifest: Manifest, executor: Executor, folder: Path, *, context: int | None = None, max_batch: int | None = None
    ) -> None:
        """``folder``: the artifact, for its tokenizer. ``context`` and ``max_batch`` are at most the manifest's (RequestError)."""
        self.manifest = manifest
        self.folder = folder
        self.context = bounded("context", context, manifest.model.context)
        limits = manifest.limits
        self.limits = Limits(bounded("max_batch", max_batch, limits.max_batch), limits.max_rows, limits.max_logit_rows)
        self.pages = PageAllocator(executor.num_pages, manifest.kv.page_size)
        self._executor: Executor | None = executor
        self._lock = threading.Lock()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if the artifact has none, and prompts must be token ids."""
        files = self.manifest.tokenizer
        return None if files is None else Tokenizer(self.folder, files)

    def generate(
        self, prompt: Any, params: SamplingParams | None = None, *, stream: bool = False, n: int = 1, **sampling: Any
    ) -> Any:
        """Continue one prompt or several.

        ``prompt``: text, token ids or chat messages, or a list of such prompts, which run together as one ragged batch.
        ``params`` or keywords of :class:`SamplingParams` (``max_tokens=64, temperature=0.7``) say how. ``n``: samples of each
        prompt, which share its pages of KV cache.

        Returns a :class:`Completion` for one prompt with ``n=1``; otherwise a list of them, all ``n`` of the first prompt first.
        With ``stream=True`` a generator of :class:`Event`, one for each token of any of them, in the order they are made;
        closing it frees what it holds.

        Raises RequestError for a prompt that is empty or longer than the context, for bad sampling values, and if the KV
        cache cannot hold even one of the samples.
        """
        prompts, single = as_prompts(prompt)
        choice = sampling_params(params, sampling)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise RequestError(f"n={n!r} cannot be: it must be a whole number of at least 1")
        if choice.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this artifact has none")
        requests = [Request(self.encode(p), choice, index, n) for index, p in enumerate(prompts)]
        for request in requests:
            what = f"prompt {request.index}" if len(requests) > 1 else "the prompt"
            self._check_length(len(request.prompt), what)
            if len(request.prompt) == self.context:
                raise RequestError(f"{what} fills the whole context of {self.context} tokens and leaves no room for an answer")
        events = self._run(requests)
        if stream:
            return events
        results = [Completion(index, sample) for index in range(len(requests)) for sample in range(n)]
        for event in events:
            results[event.index * n + event.sample].add(event)
        return results[0] if single and n == 1 else results

    def _run(self, requests: list[Request]) -> Generator[Event, None, None]:
        bounds = Bounds(self.context, self.manifest.model.vocab_size, self._eos_ids)
        executor = self._open_executor()
        scheduler = Scheduler(executor, self.pages, self.limits, bounds, self.tokenizer)
        try:
            for request in requests:
                scheduler.add(request)
            while scheduler.unfinished:
                with self._lock:
                    events = scheduler.step()
                yield from events
        finally:
            scheduler.close()

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Teacher-forced logits, float32 [n, vocab]: row i is the model's prediction after ``ids[: i + 1]``.

        Raises RequestError if ``ids`` is empty, longer than the context or holds an id outside the vocabulary.
        """
        tokens = self._check_ids(ids)
        out = np.empty((len(tokens), self.manifest.model.vocab_size), np.float32)
        for start, part in self.teacher_forced(tokens):
            out[start : start + len(part)] = part
        return out

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of every token of ``text`` given those before it. The first token, mostly a BOS, has none.

        Raises RequestError if ``text`` has fewer than two tokens or more than the context.
        """
        tokens = self.encode(text)
        if len(tokens) < 2:
            raise RequestError(f"the text has {len(tokens)} token, and a score needs at least 2: give a longer text")
        logprobs: list[float] = []
        for start, part in self.teacher_forced(tokens):
            targets = tokens[start + 1 : start + 1 + len(part)]
            logprobs += log_softmax(part)[np.arange(len(targets)), targets].tolist()
        return Score(tokens, logprobs)

    def teacher_forced(self, ids: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """What :meth:`logits` gives, in chunks: (index of the first row, float32 [rows, vocab], valid until the next chunk)."""
        tokens = self._check_ids(ids)
        self._check_length(len(tokens), "the text")
        executor = self._open_executor()
        sequence = TokenSequence(tokens, self.pages)
        chunk = min(self.limits.max_rows, self.limits.max_logit_rows)
        finite = True
        try:
            while sequence.pending:
                start, rows = sequence.table.length, min(chunk, sequence.pending)
                with self._lock:
                    sequence.table.reserve(rows, executor.copy_page)
                    logits = executor.run(build_step([Chunk(sequence, rows, rows)]))
                    sequence.table.advance(rows)
                    finite = bool(np.isfinite(logits[-1]).all())
                    yield start, logits
        finally:
            if not finite:
                clear_pages(executor, [sequence.table])
            sequence.table.release()

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt: text with the tokens its tokenizer adds, chat messages by the chat template, ids as they are.

        Raises RequestError if there is no tokenizer or template for it, or if it comes out empty.
        """
        if isinstance(prompt, str):
            ids = self._need_tokenizer().encode(prompt)
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            # the template writes the special tokens itself
            ids = self._need_tokenizer().encode(self.apply_chat_template(prompt), add_special_tokens=False)
        else:
            return self._check_ids(prompt)
        if not ids:
            raise RequestError("the prompt is empty: it must come to at least one token")
        return self._check_ids(ids)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        """The prompt text of chat ``messages``; ``options`` as for :meth:`llmc.runtime.template.ChatTemplate.render`."""
        template = self._template
        if template is None:
            raise RequestError(f"{self.manifest.model.name} has no chat template: give the prompt as text")
        return str(template.render(messages, **options))

    @cached_property
    def _template(self) -> Any:
        files = self.manifest.tokenizer
        if files is None or files.chat_template is None:
            return None
        from llmc.runtime.template import ChatTemplate

        source = (self.folder / files.chat_template).read_text(encoding="utf-8")
        return ChatTemplate(source, bos_token=files.bos_token, eos_token=files.eos_token)

    @property
    def _eos_ids(self) -> frozenset[int]:
        files = self.manifest.tokenizer
        return frozenset() if files is None else frozenset(files.eos_token_ids)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this artifact has no tokenizer: give the prompt as token ids")
        return self.tokenizer

    def _check_ids(self, ids: Any) -> list[int]:
        vocab = self.manifest.model.vocab_size
        try:
            values = np.array(ids if isinstance(ids, Sequence | np.ndarray) else [])
        except ValueError:  # lists of several lengths
            values = np.array([])
        # Numbers beyond 64 bits come as objects.
        whole = values.dtype.kind in "iu" or (values.dtype.kind == "O" and all(isinstance(v, int) for v in values.flat))
        if values.ndim != 1 or not values.size or not whole:
            raise RequestError("token ids must be a list of whole numbers that is not empty")
        wrong = values[(values < 0) | (values >= vocab)]
        if wrong.size:
            raise RequestError(f"the token id {wrong[0]} is not in the vocabulary: ids go from 0 to {vocab - 1}")
        found: list[int] = values.tolist()
        return found

    def _check_length(self, count: int, what: str) -> None:
        if count > self.context:
            raise RequestError(
                f"{what} has {count} tokens and the context is {self.context}: shorten it, "
                f"or load the model with a larger context (at most {self.manifest.model.context})"
            )

    def _open_executor(self) -> Executor:
        if self._executor is None:
            raise RequestError("the model is closed: load it again")
        return self._executor

    @property
    def executor(self) -> Any:
        """What runs the module: for measurements, which ask it for more than an :class:`Executor` promises."""
        return self._open_executor()

    def close(self) -> None:
        """Let go of the module, the weights and the KV cache. The model cannot be used afterwards."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def bounded(name: str, wish: int | None, limit: int) -> int:
    """``wish``, or ``limit`` for None. Raises RequestError unless 1 <= wish <= limit."""
    if wish is None:
        return limit
    if isinstance(wish, bool) or not isinstance(wish, int) or not 1 <= wish <= limit:
        raise RequestError(
            f"{name}={wish!r} cannot be: the artifact was compiled for 1 to {limit}: recompile it with a larger {name}"
        )
    return wish


def sampling_params(params: SamplingParams | None, keywords: dict[str, Any]) -> SamplingParams:
    """``params`` or those that ``keywords`` spell out. Raises RequestError for both at once or an unknown name."""
    if params is not None and keywords:
        raise RequestError(f"give either params or {', '.join(sorted(keywords))}, not both")
    unknown = sorted(set(keywords) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise RequestError(f"there is no sampling parameter {', '.join(unknown)}: there are {known}")
    return params or SamplingParams(**keywords)


def as_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts in ``prompt``, and whether it is a single one (text, ids, messages). Raises RequestError if it is neither."""
    if isinstance(prompt, str | np.ndarray):
        return [prompt], True
    if not isinstance(prompt, Sequence) or not prompt:
        raise RequestError("a prompt must be text, token ids or chat messages, or a list of such prompts, and not empty")
    if isinstance(prompt[0], int | np.integer | Mapping):
        return [prompt], True
    return list(prompt), False
