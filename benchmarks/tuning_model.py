"""Which tuning records make whole models faster on a GPU, on a machine that has no compiler.

    python benchmarks/tuning_model.py prepare FOLDER [--only 8b-int4] [--known RESULTS.jsonl.xz]
                                                                       with llmc's compiler; needs no GPU and little disk
    python benchmarks/tuning_model.py run FOLDER                       on the GPU: numpy, torch, tvm_ffi and TVM's runtime libraries
    python benchmarks/tuning_model.py import FOLDER --records FILE     adds the verdicts to a file of records

``prepare`` compiles llamas of 1.2 and 8 billion parameters with llmc's defaults, and once more for every set of shipped records,
and of those in the files ``--known``, that validation may ask for, headers of the weights only. ``run`` fills in random weights and
decides as ``llmc tune`` does (:mod:`llmc.tune.validate`), one range of rows after the other.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cuda_smoke import MODELS, fill_weights, headers_only, write_model

from llmc.schedules.lookup import SHIPPED, Records, load
from llmc.schedules.records import append, parse_line
from llmc.tune import offline_model

TARGET = "cuda:sm_90a"
SUBJECTS = {"8b-int4": ("8b", "int4_g128"), "1b-int4": ("1b", "int4_g128"), "8b-bf16": ("8b", None), "1b-bf16": ("1b", None)}


def prepare(folder: Path, only: str, share: tuple[int, int], more: list[Path]) -> None:
    """Compile every subject whose name contains ``only``. ``share``: of its artifacts every n-th from the i-th on, (i, n);
    ``more``: files of records."""
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    from tuning import read_records

    from llmc import targets
    from llmc.progress import SilentProgress
    from llmc.tune import pack_model
    from llmc.tune.subject import Subject
    from llmc.tune.task import tasks_of

    target, known = targets.parse(TARGET), Records(load([SHIPPED]).entries)
    for path in more:
        read_records(known, path)
    for name, (size, quant) in SUBJECTS.items():
        if only not in name:
            continue
        start = time.perf_counter()
        source = folder / f"{name}.model{share[0]}" / f"llama-{name}"
        write_model(source, MODELS[size], zeros=True)
        compiling = {"dtype": "bfloat16", "quant": quant}
        with headers_only(), Subject(str(source), target, compiling, SilentProgress()) as subject:
            subject.earlier.folder = None  # there are no weights to link to
            tasks = tasks_of(subject.kernels(), target)
            pack_model.write(folder / name, subject, tasks, known, _say, share)
        shutil.rmtree(source.parent)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _say(done: int, total: int, what: str) -> None:
    print(f"{done} of {total}: {what}", flush=True)


def run(folder: Path, only: str) -> None:
    """Decide about every subject's finds."""
    from llmc.tune.devices import device_name

    for name in (n for n in SUBJECTS if only in n and (folder / n / offline_model.CONTENTS).is_file()):
        start = time.perf_counter()
        fill_weights(folder / name / "0")
        offline_model.run(folder / name, device_name("cuda"), lambda line: print(line, flush=True))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        for weights in (folder / name).glob("*/weights/*.safetensors"):
            weights.unlink()


def import_verdicts(folder: Path, records: Path) -> None:
    """Add the verdicts of all subjects."""
    for path in sorted(folder.glob(f"*/{offline_model.VERDICTS}")):
        append(records, [parse_line(line) for line in path.read_text(encoding="utf-8").splitlines()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "import"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="prepare: every N-th artifact from the I-th (default: all)")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="prepare: records beside those that are shipped")
    parser.add_argument("--records", type=Path, default=SHIPPED / "cuda-sm_90a.jsonl", help="import: the file of records")
    args = parser.parse_args()
    if args.what == "prepare":
        i, _, n = args.share.partition("/")
        prepare(args.folder, args.only, (int(i), int(n)), args.known)
    elif args.what == "run":
        run(args.folder, args.only)
    else:
        import_verdicts(args.folder, args.records)


if __name__ == "__main__":
    main()
