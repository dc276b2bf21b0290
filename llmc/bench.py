"""How fast an artifact runs, beside what this machine's memory could deliver: the limit of decoding is reading the weights.

``pp512`` is the prefill of a prompt of 512 tokens up to its first token, ``tg128`` the generation of 128 tokens one by one, as in
llama.cpp's llama-bench. Tokens are pseudo-random; the first runs of each test only warm up. On a GPU its own clock runs beside:
what the wall clock shows more than it is the gap, time in which the GPU waited for the host.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import RequestError
from llmc.units import format_bytes, format_parameters

if TYPE_CHECKING:
    from llmc.manifest import Manifest
    from llmc.progress import Phase, Progress
    from llmc.runtime import Model

READ_BYTES = 512 << 20
READ_REPEATS = 5
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1, "uint8": 1}


@dataclass
class Subject:
    """What is timed: ``bytes`` are those of the weights. ``threads``: None on a GPU."""

    model: str
    bytes: int
    parameters: int
    target: str
    threads: int | None


@dataclass
class Row(Subject):
    """One test. ``gb_per_second`` is what generation reads (weights and KV), ``percent_of_limit`` that over the measured read
    bandwidth; both None for prefill, which computes more than it reads, and where experts make the bytes read unknown.
    ``device_ms``: milliseconds of a GPU for each token, ``gap_percent`` the part of the wall clock's time in which it did not work
    on a step; both None on a CPU."""

    test: str
    tokens_per_second: float
    deviation: float
    gb_per_second: float | None
    percent_of_limit: float | None
    device_ms: float | None
    gap_percent: float | None


@dataclass
class Sample:
    """One run: seconds to the first token, from there to the last, and of the device on all of it (None on a CPU)."""

    first: float
    rest: float
    device: float | None


@dataclass
class Results:
    """The rows, and the read bandwidth measured in the same run (bytes per second)."""

    rows: list[Row]
    read_bandwidth: float


def run(
    folder: Path,
    progress: Progress,
    *,
    threads: int | None = None,
    prompts: Sequence[int] = (512,),
    generations: Sequence[int] = (128,),
    repeats: int = 5,
) -> Results:
    """Load the artifact in ``folder`` and time it: prefill of each length in ``prompts``, generation of each in ``generations``.

    Every test runs ``repeats`` times. ``threads`` defaults to one for each physical core; a GPU takes none.

    Raises RequestError for a length that does not fit the artifact's context.
    """
    from llmc.runtime import load
    from llmc.runtime.artifact import open_artifact
    from llmc.runtime.host import default_threads

    artifact = open_artifact(folder)
    info = artifact.manifest
    longest = max([*(n + 1 for n in prompts), *(n + 2 for n in generations)], default=0)
    if longest > info.model.context:
        raise RequestError(
            f"a test of {longest} tokens does not fit the artifact's context of {info.model.context}: lower -p and -n"
        )
    on_gpu = artifact.variant.kind == "cuda"
    count = None if on_gpu else default_threads() if threads is None else threads
    model = load(folder, threads=threads if on_gpu else count, context=max(longest, 1))
    subject = Subject(
        model=info.model.name,
        bytes=sum(f.bytes for name, f in info.files.items() if name.startswith("weights/")),
        parameters=info.model.parameters,
        target=artifact.variant.target,
        threads=count,
    )
    with progress.phase("memory bandwidth"):
        limit = read_bandwidth(count) if count is not None else model.executor.bandwidth()
    timer = model.executor.start_timer() if on_gpu else None
    rng = np.random.default_rng(0)
    rows = []
    for length in prompts:
        ids = rng.integers(info.model.vocab_size, size=length).tolist()
        with progress.phase(f"pp{length}", total=repeats) as phase:
            samples = _samples(model, timer, ids, 1, repeats, phase)
        rows.append(_row(subject, f"pp{length}", samples, [length / s.first for s in samples], length, None, limit))
    for tokens in generations:
        ids = rng.integers(info.model.vocab_size, size=1).tolist()
        with progress.phase(f"tg{tokens}", total=repeats) as phase:
            # The first token belongs to the prompt.
            samples = _samples(model, timer, ids, tokens + 1, repeats, phase)
        read = bytes_per_token(info, tokens)
        rows.append(_row(subject, f"tg{tokens}", samples, [tokens / s.rest for s in samples], tokens + 1, read, limit))
    return Results(rows, limit)


def _samples(model: Model, timer: Any, ids: list[int], tokens: int, repeats: int, phase: Phase) -> list[Sample]:
    """``repeats`` runs after those that warm up: the first allocates, and on a GPU the second records the step's graph."""
    found = []
    for i in range(-2, repeats):
        sample = _time(model, timer, ids, tokens)
        if i >= 0:
            found.append(sample)
            phase.advance()
    return found


def _time(model: Model, timer: Any, ids: list[int], tokens: int) -> Sample:
    """Run a prompt and ``tokens`` tokens after it."""
    start = time.perf_counter()
    first = 0.0
    for event in model.generate(ids, max_tokens=tokens, ignore_eos=True, stream=True):
        if event.token_ids and not first:
            first = time.perf_counter()
    end = time.perf_counter()
    return Sample(first - start, end - first, None if timer is None else timer.seconds())


def _row(
    subject: Subject, test: str, samples: list[Sample], speeds: list[float], tokens: int, read: float | None, limit: float
) -> Row:
    """A test's row; ``tokens``: how many the device worked on in each run, ``read``: bytes for each generated one."""
    mean = statistics.fmean(speeds)
    rate = None if read is None else mean * read
    device = sum(s.device for s in samples if s.device is not None)
    wall = sum(s.first + s.rest for s in samples)
    return Row(
        **asdict(subject),
        test=test,
        tokens_per_second=mean,
        deviation=statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        gb_per_second=None if rate is None else rate / 1e9,
        percent_of_limit=None if rate is None else 100 * rate / limit,
        device_ms=1e3 * device / (tokens * len(samples)) if device else None,
        gap_percent=100 * (1 - device / wall) if device else None,
    )


def bytes_per_token(info: Manifest, generated: int) -> float | None:
    """Bytes that generating one token reads: every weight, and on average half of the KV of ``generated`` tokens.

    Of two matrices with a row per vocabulary entry one is the embedding, of which a token reads a single row. None if the model has
    experts: which of them are read depends on the token.
    """
    variant = info.variants[0]
    if any(k.op == "llmc.moe" for k in variant.kernels):
        return None
    sizes = {name: prod(info.tensors[name].shape) * WIDTHS[info.tensors[name].dtype] for name in variant.weights}
    tables = [n for n in sizes if len(info.tensors[n].shape) == 2 and info.tensors[n].shape[0] == info.model.vocab_size]
    unread = sizes[tables[0]] if len(tables) == 2 else 0
    return sum(sizes.values()) - unread + info.kv.bytes_per_token * generated / 2


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads read from memory: the best of a few dot products over arrays larger than caches."""
    pairs = [np.ones((2, READ_BYTES // 8 // threads), np.float32) for _ in range(threads)]
    total = sum(pair.nbytes for pair in pairs)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_REPEATS):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.dot(pair[0], pair[1]), pairs))
            best = min(best, time.perf_counter() - start)
    return total / best


HEADINGS = ("model", "size", "params", "target", "threads", "test", "tok/s", "GB/s", "% of read limit", "GPU ms/tok", "gap")


def to_markdown(results: Results) -> str:
    """A table like llama-bench's, and the measured limit below it."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'|'.join([' --- '] * 4 + [' ---: '] * 7)}|"]
    for r in results.rows:
        rate = "" if r.gb_per_second is None else f"{r.gb_per_second:.2f}"
        share = "" if r.percent_of_limit is None else f"{r.percent_of_limit:.0f} %"
        threads = "" if r.threads is None else str(r.threads)
        device = "" if r.device_ms is None else f"{r.device_ms:.3f}"
        gap = "" if r.gap_percent is None else f"{r.gap_percent:.1f} %"
        cells = (r.model, format_bytes(r.bytes), format_parameters(r.parameters), r.target, threads, r.test)
        lines.append(
            f"| {' | '.join(cells)} | {r.tokens_per_second:.2f} ± {r.deviation:.2f} | {rate} | {share} | {device} | {gap} |"
        )
    return "\n".join([*lines, "", f"Memory read limit measured in this run: {results.read_bandwidth / 1e9:.1f} GB/s."])


def to_json(results: Results) -> str:
    """Rows and limit as one JSON object; speeds in tokens and bytes per second."""
    return json.dumps(asdict(results), indent=1)


def to_csv(results: Results) -> str:
    """One line a row under a heading; the read limit is a column."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*Row.__dataclass_fields__, "read_bandwidth"], lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow(asdict(row) | {"read_bandwidth": results.read_bandwidth})
    return out.getvalue().rstrip("\n")


FORMATS = {"md": to_markdown, "json": to_json, "csv": to_csv}
