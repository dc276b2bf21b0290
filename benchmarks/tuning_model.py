"""Which tuning records make whole models faster on a GPU, on a machine that has no compiler.

    python benchmarks/tuning_model.py prepare FOLDER [--only 8b-int4]  with llmc's compiler; needs no GPU and little disk
    python benchmarks/tuning_model.py run FOLDER                       on the GPU: numpy, torch, tvm_ffi and TVM's runtime libraries
    python benchmarks/tuning_model.py import FOLDER --records FILE     adds the verdicts to a file of records

``prepare`` compiles llamas of 1.2 and 8 billion parameters with llmc's defaults, and once more for every set of shipped records
that validation may ask for, headers of the weights only. ``run`` fills in random weights and decides as ``llmc tune`` does
(:mod:`llmc.tune.validate`), one range of rows after the other, into ``FOLDER/verdicts.jsonl``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cuda_smoke import MODELS, fill_weights, headers_only, write_model

from llmc.schedules.lookup import SHIPPED, Records, default_text, load, slowdowns, worthwhile
from llmc.schedules.records import append, axes, call_from_json, call_to_json, parse_line, restore
from llmc.tune.compare import Site
from llmc.tune.turns import Turns, Workload
from llmc.tune.validate import Find, Validation

TARGET = "cuda:sm_90a"
SUBJECTS = {"8b-int4": ("8b", "int4_g128"), "1b-int4": ("1b", "int4_g128"), "8b-bf16": ("8b", None), "1b-bf16": ("1b", None)}
MOST = 3
"""Finds of a range of rows whose sets are all compiled; of more, those that save the least are left out."""


@dataclass
class Packed:
    """A subject of ``prepare``: its finds, and for each of its artifacts (the first with none) which of them it has."""

    finds: list[Find]
    artifacts: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        finds = [{**asdict(f), "call": call_to_json(f.call)} for f in self.finds]
        return {"finds": finds, "artifacts": self.artifacts}


def from_json(value: dict[str, Any]) -> Packed:
    finds = []
    for f in value["finds"]:
        saves = tuple((Workload(**workload), seconds) for workload, seconds in f["saves"])
        finds.append(Find(**{**f, "call": call_from_json(f["call"]), "saves": saves}))
    return Packed(finds, value["artifacts"])


def prepare(folder: Path, only: str, share: tuple[int, int]) -> None:
    """Compile every subject whose name contains ``only``. ``share``: of its artifacts every n-th from the i-th on, (i, n): several
    processes may share the work."""
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)
    from llmc import targets
    from llmc.progress import SilentProgress
    from llmc.tune.subject import Subject
    from llmc.tune.task import tasks_of

    target = targets.parse(TARGET)
    for name, (size, quant) in SUBJECTS.items():
        if only not in name:
            continue
        start = time.perf_counter()
        source = folder / f"{name}.model{share[0]}"
        write_model(source, MODELS[size], zeros=True)
        compiling = {"dtype": "bfloat16", "quant": quant}
        with headers_only(), Subject(str(source), target, compiling, SilentProgress()) as subject:
            subject.earlier.folder = None  # there are no weights to link to
            finds = _finds(tasks_of(subject.kernels(), target))
            packed = Packed(finds, _sets(finds))
            for i, taken in list(enumerate(packed.artifacts))[share[0] :: share[1]]:
                verdicts = [finds[j].verdict(True, 1.0, name, "", "") for j in taken]
                subject.build(Records(load([SHIPPED]).entries).supposing(verdicts), folder / name / str(i))
                print(f"{name} {i}: {[finds[j].label for j in taken]} after {time.perf_counter() - start:.0f} s", flush=True)
        (folder / name / "finds.json").write_text(json.dumps(packed.to_json()), encoding="utf-8")
        shutil.rmtree(source)


def _finds(tasks: list[Any]) -> list[Find]:
    """What the shipped records say is faster alone than the defaults."""
    from llmc.schedules.records import machine_class
    from llmc.tune.task import find, workloads

    known, found = load([SHIPPED]), []
    for task in tasks:
        mine = [r for r in known.of_family(task.family, machine_class(task.target)) if r.call == task.call]
        mine = [r for r in mine if axes(r.config) == task.space.keys() and restore(r.config, task.space) is not None]
        scores, default = slowdowns(mine), default_text(task.space)
        if default not in scores or (best := worthwhile(scores, default)) == default:
            continue
        seconds = {(r.config, r.symbols): r.seconds for r in mine}
        saves = []
        for workload, size in zip(workloads(task), task.sizes, strict=True):
            before, after = (seconds[text, tuple(sorted(size.items()))] or math.nan for text in (default, best))
            saves.append((workload, (task.per_token + task.per_prefill) * (before - after)))
        found.append(find(task, best, tuple(saves)))
    by_rows = {rows: sorted((f for f in found if f.rows == rows), key=_saved)[:MOST] for rows in {f.rows for f in found}}
    return [f for rows in sorted(by_rows) for f in by_rows[rows]]


def _saved(find: Find) -> float:
    return -sum(seconds for _, seconds in find.saves)


def _sets(finds: list[Find]) -> list[list[int]]:
    """Artifacts so that for each range of rows every set of its finds is in one of them: ranges do not touch each other."""
    by_rows: dict[str, list[int]] = {}
    for i, find in enumerate(finds):
        by_rows.setdefault(find.rows, []).append(i)
    subsets = [[set(c) for n in range(len(g) + 1) for c in itertools.combinations(g, n)] for g in by_rows.values()]
    return [sorted(set().union(*column)) for column in itertools.zip_longest(*subsets, fillvalue=set())]


def run(folder: Path, only: str) -> None:
    """Decide about every subject's finds."""
    from llmc.tune.devices import open_device

    device = open_device("cuda")
    device.close()
    out, runner = folder / "verdicts.jsonl", Turns()
    for name in (n for n in SUBJECTS if only in n and (folder / n / "finds.json").is_file()):
        start = time.perf_counter()
        packed = from_json(json.loads((folder / name / "finds.json").read_text(encoding="utf-8")))
        base = folder / name / "0"
        fill_weights(base)
        for rows in dict.fromkeys(f.rows for f in packed.finds):
            mine = [f for f in packed.finds if f.rows == rows]
            site = Site(_described(name), runner, Records(), out, folder / name / f"rows {rows}", device.name, "llmc 0.1.0", _say)
            Validation(site, _Prepared(folder / name, packed, rows), 128).run(mine)
        runner.close()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        for weights in (folder / name).glob("*/weights/*.safetensors"):
            weights.unlink()


def _described(name: str) -> str:
    size, quant = SUBJECTS[name]
    return f"a llama of {size} parameters in {quant or 'bfloat16'}"


def _say(line: str) -> None:
    print(line, flush=True)


class _Prepared:
    """Finds the artifact that was compiled for a set of finds of one range of rows, and gives it the weights."""

    def __init__(self, folder: Path, packed: Packed, rows: str) -> None:
        self.folder, self.packed, self.rows = folder, packed, rows

    def __call__(self, finds: frozenset[Find], out: Path) -> None:
        """Link the artifact to ``out``."""
        artifact = next(
            self.folder / str(i)
            for i, taken in enumerate(self.packed.artifacts)
            if {f for f in (self.packed.finds[j] for j in taken) if f.rows == self.rows} == finds
        )
        for weights in (self.folder / "0" / "weights").glob("*.safetensors"):
            link = artifact / "weights" / weights.name
            if not link.exists():
                link.hardlink_to(weights)
        out.parent.mkdir(exist_ok=True)
        out.unlink(missing_ok=True)
        out.symlink_to(artifact.resolve())


def import_verdicts(folder: Path, records: Path) -> None:
    """Add the verdicts in ``FOLDER/verdicts.jsonl``."""
    lines = (folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    append(records, [parse_line(line) for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "import"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="prepare: every N-th artifact from the I-th (default: all)")
    parser.add_argument("--records", type=Path, default=SHIPPED / "cuda-sm_90a.jsonl", help="import: the file of records")
    args = parser.parse_args()
    if args.what == "prepare":
        i, _, n = args.share.partition("/")
        prepare(args.folder, args.only, (int(i), int(n)))
    elif args.what == "run":
        run(args.folder, args.only)
    else:
        import_verdicts(args.folder, args.records)


if __name__ == "__main__":
    main()
