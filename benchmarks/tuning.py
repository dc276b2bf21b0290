"""How good the search for kernel configurations is, and what tuning gains on a GPU.

    python benchmarks/tuning.py calls CALLS.jsonl [--quant S]  needs the compiler: what the 1B and 8B models call
    python benchmarks/tuning.py pack FOLDER --calls CALLS.jsonl  candidates for it, compiled; no GPU
    python FOLDER/run.py                                       on the GPU: writes FOLDER/results.jsonl
    python benchmarks/tuning.py quality RESULTS.jsonl          how much of the best a search finds in a tenth of a space
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from llmc import targets
from llmc.schedules.parts import spaces
from llmc.schedules.records import Record, Records, axes, call_from_json, call_to_json, config_text, slowdowns
from llmc.tune.build import family_named
from llmc.tune.cost_model import CostModel
from llmc.tune.search import enumerate_space, propose
from llmc.tune.task import Task, make, tasks_of

TARGET = "cuda:sm_90a"
MODELS = ("8b", "1b")
MOST = 32
"""Configurations of a kernel that are packed unless more are asked for."""

WHOLE_AT_LEAST = 8
"""Configurations from which on the search of a kernel is replayed."""

SEEDS = 4


def write_calls(path: Path, kernels: str, quant: str | None) -> None:
    """The calls of both models that have something to tune and that the pattern fits, a line of JSON each."""
    from cuda_smoke import MODELS as SIZES
    from cuda_smoke import write_model

    from llmc import compiler

    lines: dict[str, None] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as source:
            write_model(Path(source) / name, SIZES[name], zeros=True)
            choices = compiler.kernels(str(Path(source) / name), target=TARGET, dtype="bfloat16", quant=quant, max_batch=16)
        for task in tasks_of(choices, targets.parse(TARGET), kernels):
            lines[json.dumps({"family": task.family.NAME, "call": call_to_json(task.call)}) + "\n"] = None
    path.write_text("".join(lines), encoding="utf-8")


def read_tasks(paths: Sequence[Path], parts: Sequence[str], shapes: Sequence[str]) -> list[Task]:
    """The tasks of the calls in files, of the ranges of rows ``parts`` (none: all) and the weights ``shapes``, such as
    ``4096x4096``."""
    target = targets.parse(TARGET)
    found = []
    for value in (json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()):
        call, family = call_from_json(value["call"]), family_named(value["family"], target)
        if not shapes or "x".join(map(str, _shape(call))) in shapes:
            found += [t for t in make(family, call, target, 1, 1, _title(family.NAME, call)) if not parts or t.part in parts]
    return found


def pack(folder: Path, tasks: Sequence[Task], most: int, known: Path | None, workers: int) -> None:
    """Compile up to ``most`` candidates of each task."""
    from llmc.tune import pack as packing
    from llmc.tune.extract import Chooser
    from llmc.tune.tuner import versions

    records, rng = Records(), random.Random(0)
    if known is not None:
        _read(records, known)
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


def _read(records: Records, path: Path) -> None:
    """Add the records of a file, ``.jsonl`` or ``.jsonl.xz``."""
    if path.suffix != ".xz":
        records.read(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        records.read(Path(folder) / path.stem)


def _load(path: Path) -> tuple[dict[Any, list[Record]], Any]:
    """The records of a file by family, call and axes, and the target."""
    records, target = Records(), targets.parse(TARGET)
    _read(records, path)
    by_call: dict[Any, list[Record]] = {}
    for r in records.entries.values():
        by_call.setdefault((r.family, r.call, axes(r.config)), []).append(r)
    for note in records.notes:
        print(note, file=sys.stderr)
    return dict(sorted(by_call.items(), key=lambda item: item[0][0])), target


def _space(family: Any, record: Record, target: Any) -> dict[str, list[Any]]:
    """The space that a record's configuration is from."""
    return next(s for s in spaces(family, record.call, target) if s.keys() == axes(record.config))


def search_loss(
    records: Sequence[Record], others: Sequence[Record], family: Any, target: Any, trials: int, learn: bool, seed: int
) -> float:
    """log(time found / best time) of one search of ``trials`` configurations over measured times.

    ``others``: records of other calls that the cost model may learn from before it starts.
    """
    call = records[0].call
    times = slowdowns(records)
    by_config: dict[str, list[Record]] = {}
    for r in records:
        by_config.setdefault(r.config, []).append(r)
    rng = random.Random(seed)
    space = _space(family, records[0], target)
    everything = [c for c in enumerate_space(space, rng) if config_text(c) in by_config]
    default = {axis: values[0] for axis, values in space.items()}
    if not learn:
        tried = [default, *rng.sample([c for c in everything if c != default], trials - 1)]
    else:
        model = CostModel(lambda c: family.space(c, target))
        tried = [default]
        model.fit(others)
        while len(tried) < trials:
            score = (lambda configs: model.score(configs, call)) if model.ready else None
            tried += propose(everything, tried, min(6, trials - len(tried)), score, rng)
            model.fit([*others, *(r for c in tried for r in by_config[config_text(c)])])
    return min(times.get(config_text(c), float("inf")) for c in tried)


def _shape(call: Any) -> list[int]:
    """Outputs and inputs of a linear layer, else the shape of what is read."""
    return [int(call.attr("o")), int(call.attr("k"))] if call.attr("o") else list(call.args[1].shape)


def _title(name: str, call: Any, part: frozenset[str] = frozenset()) -> str:
    """The kernel for people; of a family with parts, which."""
    return f"{name} {_shape(call)}" + (f" n={next(iter(part))}" if len(part) == 1 else "")


def quality(path: Path) -> None:
    """A table: for every space packed whole, how much of the best speed searches find in a tenth and a fifth of the trials."""
    by_call, target = _load(path)
    print("| kernel | space | default | trials | random | cost model | cost model, other shapes known |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for (name, call, part), records in by_call.items():
        family = family_named(name, target)
        times = slowdowns(records)
        if len(times) < WHOLE_AT_LEAST:
            continue
        others = [r for (n, c, _), rs in by_call.items() if n == name and c != call for r in rs]
        default = config_text({axis: values[0] for axis, values in _space(family, records[0], target).items()})
        first = f"{math.exp(-times[default]):.1%}" if default in times else "failed"
        for trials in sorted({max(2, round(len(times) / share)) for share in (10, 5)}):
            shares = []
            for known, learn in (([], False), ([], True), (others, True)):
                losses = [search_loss(records, known, family, target, trials, learn, seed) for seed in range(SEEDS)]
                shares.append(f"{math.exp(-statistics.mean(losses)):.1%} (worst {math.exp(-max(losses)):.1%})")
            print(f"| {_title(name, call, part)} | {len(times)} | {first} | {trials} | {' | '.join(shares)} |", flush=True)


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
        default = config_text({axis: values[0] for axis, values in _space(family, records[0], target).items()})
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
    parser.add_argument("path", type=Path)
    parser.add_argument("--kernels", default="*", help="calls: only kernels that this pattern fits")
    parser.add_argument("--quant", help="calls: the scheme of the models' weights (default: bfloat16)")
    parser.add_argument("--calls", nargs="+", type=Path, help="pack: files of calls")
    parser.add_argument("--parts", nargs="*", default=[], help="pack: only these ranges of rows, such as 1-8 (default: all)")
    parser.add_argument("--shapes", nargs="*", default=[], help="pack: only weights of these shapes, such as 4096x4096")
    parser.add_argument("--most", type=int, default=MOST, help=f"pack: configurations of a kernel (default: {MOST})")
    parser.add_argument("--known", type=Path, help="pack: records that the configurations are chosen by")
    parser.add_argument("--workers", type=int, default=1, help="pack: processes that compile (default: 1)")
    options = parser.parse_args()
    if options.action == "calls":
        write_calls(options.path, options.kernels, options.quant)
    elif options.action == "pack":
        if not options.calls:
            parser.error("pack needs --calls")
        pack(options.path, read_tasks(options.calls, options.parts, options.shapes), options.most, options.known, options.workers)
    else:
        {"quality": quality, "gains": gains}[options.action](options.path)


if __name__ == "__main__":
    main()
