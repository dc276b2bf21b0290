"""Find the fastest configuration of every kernel of a model on this machine, and keep it for later compiles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmc.cli import options

HELP = "search for faster kernel configurations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model, or an artifact folder; not with --import")
    budget = parser.add_argument_group("search")
    budget.add_argument("--trials", type=options.positive, metavar="N", help="configurations to try (default: 64 a kernel)")
    budget.add_argument("--minutes", type=float, metavar="M", help="stop searching after M minutes")
    budget.add_argument("--kernels", default="*", metavar="PATTERN", help="only kernels or families that fit, such as 'gemv*'")
    budget.add_argument("--resume", action="store_true", help="do not try again what this machine's records already have")
    budget.add_argument(
        "--whole",
        action="store_true",
        help="tune what concerns the whole model instead: page size, fusion, early starts, pieces of work; compiles it for each",
    )
    budget.add_argument("--records", type=Path, metavar="DIR", help="folder for the records (default: records in llmc's cache)")
    elsewhere = parser.add_argument_group("a machine without a compiler or a network")
    elsewhere.add_argument("--offline", type=Path, metavar="DIR", help="time nothing: pack the candidates and a runner into DIR")
    elsewhere.add_argument("--import", dest="results", type=Path, metavar="FILE", help="add the records that a packed runner wrote")
    options.add_compile(parser)
    options.add_output(parser, json="the outcome for every kernel")


def main(args: argparse.Namespace) -> int:
    from llmc.errors import UsageError
    from llmc.paths import records_folder

    folder = args.records or records_folder()
    if args.results is not None:
        if args.model is not None or args.offline is not None:
            raise UsageError("--import takes records that were made elsewhere: give no MODEL and no --offline with it")
        return _import(args.results, folder)
    if args.model is None:
        raise UsageError("llmc tune needs a MODEL or an artifact folder (or --import FILE)")
    if args.minutes is not None and args.minutes <= 0:
        raise UsageError(f"--minutes {args.minutes:g} is no time: give a number above 0")
    if args.whole and (args.offline is not None or args.kernels != "*"):
        raise UsageError("--whole runs the model here and has no kernels to pick: give no --offline and no --kernels with it")
    if args.target and len(args.target) > 1:
        raise UsageError(f"one target is tuned at a time, and {len(args.target)} were named: run `llmc tune` once for each")
    return _whole(args, folder) if args.whole else _tune(args, folder)


def _import(path: Path, folder: Path) -> int:
    from llmc.tune.extract import import_results

    count, notes = import_results(path, folder)
    _warn(notes)
    print(f"{count} records added to {folder}")
    return 0


def _warn(notes: list[str]) -> None:
    import sys

    for note in notes:
        print(note, file=sys.stderr)


def _tune(args: argparse.Namespace, folder: Path) -> int:
    from llmc.extras import require
    from llmc.progress import on_stderr

    require("compile", "llmc tune")
    require("tune", "llmc tune")
    from llmc import targets
    from llmc.schedules.records import SHIPPED, load
    from llmc.tune import display
    from llmc.tune.extract import TRIALS, find_tasks, pack_offline, records_file

    progress = on_stderr(args.quiet)
    compiling = options.compile_options(args)
    target = targets.parse(compiling.pop("target")[0])
    tasks = find_tasks(args.model, target, args.kernels, compiling, progress)
    known = load([SHIPPED, folder])
    trials = args.trials or (None if args.minutes is not None else TRIALS * len(tasks))
    if args.offline is not None:
        problems = pack_offline(args.offline, target, tasks, known, trials or TRIALS * len(tasks), progress)
        _warn([*known.notes, *problems])
        print(f"{args.offline}: carry it to the machine, run `python {args.offline.name}/run.py` there, bring results.jsonl back")
        return 0
    from llmc.tune.tuner import Budget, Tuner

    budget = Budget(trials, None if args.minutes is None else args.minutes * 60)
    with progress.phase("machine limits"):
        tuner = Tuner(tasks, known, records_file(folder, target), budget, resume=args.resume)
    interrupted = False
    with display.on_stderr(args.quiet) as tuner.show:
        try:
            tuner.run()
        except KeyboardInterrupt:
            interrupted = True
    _warn(known.notes)
    _print(tuner, args, interrupted)
    return 130 if interrupted else 0


def _whole(args: argparse.Namespace, folder: Path) -> int:
    from llmc.extras import require
    from llmc.progress import on_stderr

    require("compile", "llmc tune")
    from llmc import targets
    from llmc.tune.extract import records_file
    from llmc.tune.whole import search_model

    compiling = options.compile_options(args)
    target = targets.parse(compiling.pop("target")[0])
    outcome = search_model(args.model, target, compiling, records_file(folder, target), on_stderr(args.quiet))
    print(outcome.to_json() if args.json else outcome.table())
    return 0


def _print(tuner: Any, args: argparse.Namespace, interrupted: bool) -> None:
    from llmc.tune.display import summary

    if args.json:
        import json

        print(json.dumps({"records": str(tuner.out), "interrupted": interrupted, "kernels": tuner.outcome()}, indent=1))
        return
    print(summary(tuner.states))
    print(f"records in {tuner.out}; `llmc compile` uses them from now on" + (" (interrupted)" if interrupted else ""))
