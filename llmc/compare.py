"""One model stored in several ways, side by side: size, speed, and what is left of its predictions.

A way is ``SCHEME`` or ``SCHEME:METHOD`` (``int4_g64:gptq``), ``native`` for the checkpoint's own codes, ``none`` for floats, or
``4.5bpw`` with or without ``:METHOD`` for a budget. Each is compiled into the cache, so that a second comparison only measures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import manifest
from llmc.errors import UsageError
from llmc.passes.quantize.options import METHODS, NATIVE, NONE, ROUND_TO_NEAREST, QuantOptions
from llmc.passes.quantize.report import Row, bits_per_weight
from llmc.units import format_bytes

if TYPE_CHECKING:
    from llmc.evaluate import Estimate, Evaluation
    from llmc.progress import Progress

TOKENS = 128
"""Generated for the speed, or as many as a model's context holds."""
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)bpw")


@dataclass
class Stored:
    """A line of the comparison. ``bytes`` of the weights; ``bits`` per weight; ``decode``: tokens per second."""

    way: str
    bytes: int
    bits: float
    decode: float
    evaluation: Evaluation


def options_of(way: str) -> dict[str, Any]:
    """The arguments of :func:`llmc.compile` that ``way`` stands for. Raises UsageError for one that means nothing."""
    name, colon, method = way.partition(":")
    if colon and method not in METHODS:
        raise UsageError(f"--compare {way}: there is no method {method!r}: choose one of {', '.join(METHODS)}")
    checked = method or ROUND_TO_NEAREST
    named = {"method": method} if method else {}
    if name == NATIVE:
        QuantOptions(native=True, method=checked)
        return {"dtype": None, "quant": None}
    if budget := _BUDGET.fullmatch(name):
        target = float(budget[1])
        QuantOptions(target_bpw=target, method=checked)
        return {"target_bpw": target, **named}
    QuantOptions(name, method=checked)
    return {"quant": name, **named} if name != NONE else {"quant": NONE, "dtype": "float32"}


def compare(
    model: str,
    ways: Sequence[str],
    options: dict[str, Any],
    *,
    calibration: str | None,
    against: str | None,
    text: str,
    windows: int | None,
    progress: Progress,
) -> list[Stored]:
    """Compile ``model`` in all ``ways``, then measure them. ``options``: further arguments of :func:`llmc.compile`;
    ``calibration``: the text of those ways that read one (None: llmc's own); ``against``: the reference of the divergences (None:
    none are taken); ``windows``: the most windows of ``text`` to predict.

    Raises UsageError before anything is compiled if a way means nothing, and what compiling and loading raise.
    """
    from llmc import bench
    from llmc.cache import artifact_for
    from llmc.evaluate import WINDOW, evaluate, predictor, text_windows
    from llmc.runtime import load

    chosen = {way: options_of(way) for way in ways}
    if not chosen:
        raise UsageError("--compare names nothing: give schemes, such as --compare int4,int8,native")
    for own in chosen.values():
        if calibration is not None and ("target_bpw" in own or own.get("method", ROUND_TO_NEAREST) != ROUND_TO_NEAREST):
            own["calibration"] = calibration
    folders = {way: artifact_for(model, {**options, **own}, progress) for way, own in chosen.items()}
    shortest = min(manifest.read(folder).model.context for folder in folders.values())
    speeds = []
    for folder in folders.values():
        found = bench.run(folder, progress, prompts=(), generations=(max(1, min(TOKENS, shortest - 2)),), repeats=3)
        speeds.append((found.rows[0].bytes, found.rows[0].tokens_per_second))
    context = min(WINDOW, shortest)
    reference = None
    if against is not None:
        with progress.phase("load reference"):
            reference = predictor(against, context=context)
    with ExitStack() as stack:
        models = [stack.enter_context(load(folder, context=context)) for folder in folders.values()]
        evaluations = evaluate(models, text_windows(models[0], text, context, windows), reference, progress)
    bits = [_bits(folder) for folder in folders.values()]
    return [
        Stored(way, size, each, speed, evaluation)
        for way, (size, speed), each, evaluation in zip(chosen, speeds, bits, evaluations, strict=True)
    ]


def _bits(folder: Path) -> float:
    """Bits per weight of an artifact, from its report."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return bits_per_weight(Row(**row) for row in report["weights"])


def to_markdown(rows: Sequence[Stored]) -> str:
    """A table; intervals are those of :mod:`llmc.evaluate`."""
    divergence = rows[0].evaluation.against is not None
    headings = ["stored as", "bits", "weights", "decode tok/s", "perplexity"]
    headings += ["ratio to the reference", "KL divergence", "top-1 equal"] if divergence else []
    lines = [f"| {' | '.join(headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    for row in rows:
        found = row.evaluation
        cells = [row.way, f"{row.bits:.2f}", format_bytes(row.bytes), f"{row.decode:.1f}", _interval(found.perplexity, ".2f")]
        if (beside := found.against) is not None:
            cells += [_interval(beside.ratio, ".3f"), _interval(beside.kl, ".4f"), _interval(beside.top1, ".1%")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def to_json(rows: Sequence[Stored]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}}-{estimate.high:{form}})"
