"""How good the search for kernel configurations is, and what tuning gains on a GPU.

    python benchmarks/tuning.py calls CALLS.jsonl [--quant S]  needs the compiler: what the 1B and 8B models call
    python benchmarks/tuning.py pack FOLDER --calls CALLS.jsonl  candidates for it, compiled; no GPU
    python FOLDER/run.py                                       on the GPU: writes FOLDER/results.jsonl
    python benchmarks/tuning.py quality RESULTS.jsonl ...      how much of the best a search finds in a tenth of a space
    python benchmarks/tuning.py gains RESULTS.jsonl            the best of every kernel beside its default

``pack`` holds the whole space of each kernel, or ``--most`` configurations of it: a spread, or with ``--known RESULTS.jsonl`` those
that the cost model believes in. Kernels are compiled from the sources as they are on disk: let nobody edit them meanwhile.
``quality`` replays searches against those times: a search asks for the times of a batch of configurations, as it would of a device.
What was measured stays a test of the search however the kernels change since.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from llmc import targets
from llmc.schedules.lookup import Records, slowdowns
from llmc.schedules.parts import spaces
from llmc.schedules.records import Record, axes, call_from_json, config_text
from llmc.tune.build import family_named
from llmc.tune.cost_model import CostModel
from llmc.tune.search import FIRST, Config, enumerate_space, propose
from llmc.tune.task import Task, make, tasks_of
from llmc.tune.tuner import BATCH

TARGET = "cuda:sm_90a"
MODELS = ("8b", "1b")
MOST = 32
"""Configurations of a kernel that are packed unless more are asked for."""

WHOLE_AT_LEAST = 20
"""Configurations from which on the search of a kernel is replayed."""

WAYS = ("random", "cost model", "cost model, other shapes known")
SEEDS = {WAYS[0]: 64, WAYS[1]: 4, WAYS[2]: 4}
"""Searches of each kind: a random one costs nothing to replay."""

PARTS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)
"""Of a space, for the plot."""


def write_calls(path: Path, kernels: str, quant: str | None) -> None:
    """The calls of both models that have something to tune and that the pattern fits, a line of JSON each."""
    from cuda_smoke import MODELS as SIZES
    from cuda_smoke import write_model

    from llmc import compiler

    befores: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as source:
            write_model(Path(source) / name, SIZES[name], zeros=True)
            choices = compiler.kernels(str(Path(source) / name), target=TARGET, dtype="bfloat16", quant=quant, max_batch=16)
        for task in tasks_of(choices, targets.parse(TARGET), kernels):
            setup = task.setup()
            of_call = befores.setdefault(json.dumps({"family": setup["family"], "call": setup["call"]}), {})
            if setup["before"] is not None:
                of_call.setdefault("decode" if task.in_steps else "extend", setup["before"])
    lines = (json.dumps({**json.loads(line), "before": before}) + "\n" for line, before in befores.items())
    path.write_text("".join(lines), encoding="utf-8")


def read_tasks(paths: Sequence[Path], parts: Sequence[str], shapes: Sequence[str]) -> list[Task]:
    """The tasks of the calls in files, of the ranges of rows ``parts`` (none: all) and the weights ``shapes``, such as
    ``4096x4096``."""
    target = targets.parse(TARGET)
    found = []
    for value in (json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()):
        call, family = call_from_json(value["call"]), family_named(value["family"], target)
        if not shapes or "x".join(map(str, _shape(call))) in shapes:
            before = {
                phase: (family_named(first["family"], target), call_from_json(first["call"]))
                for phase, first in value["before"].items()
            }
            tasks = make(family, call, target, 1, 1, _title(family.NAME, call), before=before)
            found += [t for t in tasks if not parts or t.part in parts]
    return found


def pack(folder: Path, tasks: Sequence[Task], most: int, known: Path | None, workers: int) -> None:
    """Compile up to ``most`` candidates of each task."""
    from llmc.tune import pack as packing
    from llmc.tune.extract import Chooser
    from llmc.tune.tuner import versions

    records, rng = Records(), random.Random(0)
    if known is not None:
        read_records(records, known)
    choose = Chooser(records, rng)
    chosen = [(task, choose(task, most)) for task in tasks if not _is_measured(task, records, most)]
    problems = packing.write(
        folder, targets.parse(TARGET), chosen, versions(),
        lambda done, total, what: print(f"{done} of {total}: {what}", flush=True), workers,
    )  # fmt: skip
    print("\n".join(problems))


def _is_measured(task: Task, records: Records, most: int) -> bool:
    """Whether the records already have so many configurations of the task, or all of them."""
    of_task = (r for r in records.entries.values() if r.call == task.call and axes(r.config) == task.space.keys())
    return len({r.config for r in of_task}) >= min(most, math.prod(map(len, task.space.values())))


def read_records(records: Records, path: Path) -> None:
    """Add the records of a file, ``.jsonl`` or ``.jsonl.xz``."""
    if path.suffix != ".xz":
        records.read(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        records.read(Path(folder) / path.stem)


def _load(path: Path) -> tuple[dict[Any, list[Record]], Any]:
    """The records of a file, all of one target, by family, call and axes; and the target."""
    records = Records()
    read_records(records, path)
    target = targets.parse(next(iter(records.entries.values())).target)
    by_call: dict[Any, list[Record]] = {}
    for r in records.entries.values():
        by_call.setdefault((r.family, r.call, axes(r.config)), []).append(r)
    for note in records.notes:
        print(note, file=sys.stderr)
    return dict(sorted(by_call.items(), key=lambda item: item[0][0])), target


def _space(family: Any, records: Sequence[Record], target: Any) -> dict[str, list[Any]]:
    """The space that the records of a kernel are from. If the family has other axes now: as it was when they were made."""
    names = axes(records[0].config)
    if now := next((s for s in spaces(family, records[0].call, target) if s.keys() == names), None):
        return now
    found: dict[str, list[Any]] = {axis: [] for axis in sorted(names)}
    for config in (json.loads(r.config) for r in records):
        for axis, value in config.items():
            if value not in found[axis]:
                found[axis].append(value)
    return found


@dataclass(frozen=True)
class Replay:
    """Searches over the measured ``records`` of one kernel; ``others``: records of other calls that a cost model may know."""

    family: Any
    target: Any
    records: Sequence[Record]
    others: Sequence[Record]

    def curve(self, trials: int, way: str, seed: int) -> list[float]:
        """log(time found / time of the best configuration) after every trial of one search, times as the mean of the logarithms
        over the sizes. ``way``: one of :data:`WAYS`; all begin with the default."""
        times, rng = slowdowns(self.records), random.Random(seed)
        by_config: dict[str, list[Record]] = {}
        for r in self.records:
            by_config.setdefault(r.config, []).append(r)
        space = _space(self.family, self.records, self.target)
        everything = [c for c in enumerate_space(space, rng) if config_text(c) in by_config]
        tried = [{axis: values[0] for axis, values in space.items()}]
        if way == "random":
            tried += rng.sample([c for c in everything if c != tried[0]], trials - 1)
        else:
            self._learn(everything, tried, trials, by_config, self.others if way == WAYS[2] else [], rng)
        losses = [times.get(config_text(c), math.inf) - min(times.values()) for c in tried]
        return [min(losses[: i + 1]) for i in range(trials)]

    def _learn(
        self,
        everything: list[Config],
        tried: list[Config],
        trials: int,
        by_config: dict[str, list[Record]],
        known: Sequence[Record],
        rng: random.Random,
    ) -> None:
        by_call: dict[Any, list[Record]] = {}
        for r in [*self.records, *known]:
            by_call.setdefault(r.call, []).append(r)
        known_spaces = {call: _space(self.family, records, self.target) for call, records in by_call.items()}
        model, call = CostModel(known_spaces.__getitem__), self.records[0].call
        times = slowdowns(self.records)
        model.fit(known)
        while len(tried) < trials:
            score = (lambda configs: model.score(configs, call)) if model.ready and len(tried) >= FIRST else None
            fastest_first = sorted(tried, key=lambda c: times.get(config_text(c), math.inf))
            tried += propose(everything, fastest_first, min(BATCH, trials - len(tried)), score, rng)
            if len(tried) < trials:
                model.fit([*known, *(r for c in tried for r in by_config[config_text(c)])])


def _shape(call: Any) -> list[int]:
    """Outputs and inputs of a linear layer, else the shape of what is read."""
    return [int(call.attr("o")), int(call.attr("k"))] if call.attr("o") else list(call.args[1].shape)


def _title(name: str, call: Any, part: frozenset[str] = frozenset()) -> str:
    """The kernel for people; of a family with parts, which."""
    return f"{name} {_shape(call)}" + (f" n={next(iter(part))}" if len(part) == 1 else "")


def quality(paths: Sequence[Path], plot: Path | None) -> None:
    """A table: for every space measured whole, how much of the best speed searches find in a tenth and a fifth of the trials.

    ``plot``: a file for the mean over the spaces after each part of the trials, SVG.
    """
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    print(f"| kernel | space | default | trials | {' | '.join(WAYS)} |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for replay in (replay for path in paths for replay in _replays(path)):
        count, first = len(slowdowns(replay.records)), replay.records[0]
        most = max(2, round(count / 5))
        found = {way: [replay.curve(most, way, seed) for seed in range(SEEDS[way])] for way in WAYS}
        for way in WAYS:
            mean = [statistics.fmean(column) for column in zip(*found[way], strict=True)]
            curves[way].append([mean[min(most, max(1, round(count * p))) - 1] for p in PARTS])
        default = f"{math.exp(-found[WAYS[0]][0][0]):.1%}"
        title = _title(first.family, first.call, axes(first.config))
        for trials in (max(2, round(count / 10)), most):
            losses = [[curve[trials - 1] for curve in found[way]] for way in WAYS]
            shares = " | ".join(f"{math.exp(-statistics.fmean(loss)):.1%} (worst {math.exp(-max(loss)):.1%})" for loss in losses)
            print(f"| {title} | {count} | {default} | {trials} | {shares} |", flush=True)
    means = {way: [math.exp(-statistics.fmean(column)) for column in zip(*curves[way], strict=True)] for way in WAYS}
    for way, values in means.items():
        print(f"{way}: " + ", ".join(f"{p:.0%} of the trials {value:.1%}" for p, value in zip(PARTS, values, strict=True)))
    if plot is not None:
        plot.write_text(_svg(means), encoding="utf-8")


def _replays(path: Path) -> Iterator[Replay]:
    """A replay for each space of a file that was measured whole."""
    by_call, target = _load(path)
    for (name, call, part), records in by_call.items():
        if len(slowdowns(records)) >= WHOLE_AT_LEAST:
            others = [r for (n, c, p), rs in by_call.items() if n == name and p == part and c != call for r in rs]
            yield Replay(family_named(name, target), target, records, others)


def _svg(means: dict[str, list[float]]) -> str:
    """Lines over :data:`PARTS`, from 80 % to 100 % of the best speed."""
    width, height, left, top = 560, 300, 60, 20

    def x(part: float) -> float:
        return left + part / PARTS[-1] * width

    def y(share: float) -> float:
        return top + (1 - share) / 0.2 * height

    font = 'font-size="12" font-family="sans-serif"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{top + height + 60}" {font}>']
    lines.append('<rect width="100%" height="100%" fill="white"/>')
    for share in (0.8, 0.85, 0.9, 0.95, 0.97, 1.0):
        dash = ' stroke-dasharray="4"' if share == 0.97 else ""
        lines.append(f'<line x1="{left}" x2="{left + width}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#bbb"{dash}/>')
        lines.append(f'<text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for part in PARTS:
        lines.append(f'<text x="{x(part):.1f}" y="{top + height + 18}" text-anchor="middle">{part:.0%}</text>')
    lines.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">part of the space that was tried</text>'
    )
    for i, (way, color) in enumerate(zip(means, ("#888", "#d62", "#26c"), strict=True)):
        points = " ".join(f"{x(p):.1f},{y(max(0.8, v)):.1f}" for p, v in zip(PARTS, means[way], strict=True))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines.append(
            f'<text x="{left + width - 10}" y="{top + height - 16 * (3 - i)}" text-anchor="end" fill="{color}">{way}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def gains(path: Path) -> None:
    """A table of every kernel: the default's time, the best's, by size; and the geometric mean of the gains."""
    by_call, target = _load(path)
    logs: list[float] = []
    print("| kernel | sizes | default, us | best, us | gain | configuration |")
    print("|---|---|---:|---:|---:|---|")
    for (name, call, part), records in by_call.items():
        family = family_named(name, target)
        scores = slowdowns(records)
        if not scores:
            continue
        best = min(scores, key=lambda text: (scores[text], text))
        default = config_text({axis: values[0] for axis, values in _space(family, records, target).items()})
        seconds = {(r.config, r.symbols): r.seconds for r in records if r.seconds is not None}
        logs.append(scores.get(default, 0.0))
        for symbols in sorted({r.symbols for r in records}):
            a, b = seconds.get((default, symbols)), seconds[best, symbols]
            if a is None:
                continue
            sizes = " ".join(f"{k}={v}" for k, v in symbols if k in ("n", "b", "context"))
            print(f"| {_title(name, call, part)} | {sizes} | {a * 1e6:.2f} | {b * 1e6:.2f} | {a / b:.3f} | {best} |")
    print(f"\nGeometric mean of the gains over {len(logs)} kernels: {math.exp(statistics.mean(logs)):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["calls", "pack", "quality", "gains"])
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+")
    parser.add_argument("--kernels", default="*", help="calls: only kernels that this pattern fits")
    parser.add_argument("--quant", help="calls: the scheme of the models' weights (default: bfloat16)")
    parser.add_argument("--calls", nargs="+", type=Path, help="pack: files of calls")
    parser.add_argument("--parts", nargs="*", default=[], help="pack: only these ranges of rows, such as 1-8 (default: all)")
    parser.add_argument("--shapes", nargs="*", default=[], help="pack: only weights of these shapes, such as 4096x4096")
    parser.add_argument("--most", type=int, default=MOST, help=f"pack: configurations of a kernel (default: {MOST})")
    parser.add_argument("--known", type=Path, help="pack: records that the configurations are chosen by")
    parser.add_argument("--workers", type=int, default=1, help="pack: processes that compile (default: 1)")
    parser.add_argument("--plot", type=Path, help="quality: a file for the plot, SVG")
    options = parser.parse_args()
    if options.action == "calls":
        write_calls(options.paths[0], options.kernels, options.quant)
    elif options.action == "pack":
        if not options.calls:
            parser.error("pack needs --calls")
        tasks = read_tasks(options.calls, options.parts, options.shapes)
        pack(options.paths[0], tasks, options.most, options.known, options.workers)
    else:
        quality(options.paths, options.plot) if options.action == "quality" else gains(options.paths[0])


if __name__ == "__main__":
    main()
