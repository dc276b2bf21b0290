"""How good the search for kernel configurations is, and what tuning gains on a GPU.

    python benchmarks/tuning.py pack FOLDER                    needs the compiler, no GPU: candidates for the 1B and 8B models
    python FOLDER/run.py                                       on the GPU: writes FOLDER/results.jsonl
    python benchmarks/tuning.py quality RESULTS.jsonl          how much of the best a search finds in a tenth of a space
    python benchmarks/tuning.py gains RESULTS.jsonl            the best of every kernel beside its default

``pack`` holds the whole space of each kernel, or a spread of one with more than :data:`MOST` configurations. Kernels are compiled
from the sources as they are on disk: let nobody edit them meanwhile. ``quality`` replays searches against those times: a search
asks for the times of a batch of configurations, as it would of a device.
"""

from __future__ import annotations

import argparse
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
from llmc import compiler, targets
from llmc.schedules.parts import spaces
from llmc.schedules.records import Record, Records, axes, config_text, machine_class, slowdowns
from llmc.tune.build import family_named
from llmc.tune.cost_model import CostModel
from llmc.tune.search import Config, enumerate_space, propose, unlike
from llmc.tune.task import Task, tasks_of

TARGET = "cuda:sm_90a"
MODELS = ("8b", "1b")
MOST = 32
"""Configurations of a kernel that are packed: all of a part's space, a spread of a larger one."""

WHOLE_AT_LEAST = 8
"""Configurations from which on the search of a kernel is replayed."""

SEEDS = 4


def pack(folder: Path, kernels: str, parts: Sequence[str], quant: str | None) -> None:
    """Compile the candidates of both models, of the kernels that the pattern fits and the ranges of rows in ``parts``."""
    from cuda_smoke import MODELS as SIZES
    from cuda_smoke import write_model

    from llmc.tune import pack as packing
    from llmc.tune.tuner import versions

    target, rng = targets.parse(TARGET), random.Random(0)
    found: dict[Any, Task] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as source:
            write_model(Path(source) / name, SIZES[name], zeros=True)
            choices = compiler.kernels(str(Path(source) / name), target=TARGET, dtype="bfloat16", quant=quant, max_batch=16)
        for task in tasks_of(choices, target, kernels):
            if not parts or task.part in parts:
                found.setdefault((task.call, task.part), task)
    problems = packing.write(
        folder, target, [(task, _candidates(task, rng)) for task in found.values()], versions(),
        lambda done, total, what: print(f"{done} of {total}: {what}", flush=True),
    )  # fmt: skip
    print("\n".join(problems))


def _candidates(task: Task, rng: random.Random) -> list[Config]:
    """The default first."""
    everything = enumerate_space(task.space, rng)
    return everything if len(everything) <= MOST else [task.default, *unlike(everything, [task.default], MOST, rng)]


def _load(path: Path) -> tuple[dict[Any, list[Record]], Any]:
    """The records of a file (``.jsonl``, or ``.jsonl.xz``) by family, call and axes, and the target."""
    records = Records()
    if path.suffix == ".xz":
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
            records.read(Path(folder) / path.stem)
    else:
        records.read(path)
    target = targets.parse(TARGET)
    families = {r.family for r in records.entries.values()}
    by_call: dict[Any, list[Record]] = {}
    for name in sorted(families):
        for r in records.of_family(family_named(name, target), machine_class(target)):
            by_call.setdefault((r.family, r.call, axes(r.config)), []).append(r)
    for note in records.notes:
        print(note, file=sys.stderr)
    return by_call, target


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


def _title(name: str, call: Any, part: frozenset[str]) -> str:
    """The kernel for people; of a family with parts, which."""
    shape = [int(call.attr("o")), int(call.attr("k"))] if call.attr("o") else list(call.args[1].shape)
    return f"{name} {shape}" + (f" n={next(iter(part))}" if len(part) == 1 else "")


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
    parser.add_argument("action", choices=["pack", "quality", "gains"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--kernels", default="*", help="pack: only kernels that this pattern fits")
    parser.add_argument("--parts", nargs="*", default=[], help="pack: only these ranges of rows, such as 1-8 (default: all)")
    parser.add_argument("--quant", help="pack: the scheme of the models' weights (default: bfloat16)")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options.path, options.kernels, options.parts, options.quant)
    else:
        {"quality": quality, "gains": gains}[options.action](options.path)


if __name__ == "__main__":
    main()
