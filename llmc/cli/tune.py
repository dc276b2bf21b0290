"""Find the fastest configuration of every kernel of a model on this machine, and keep it for later compiles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import options

if TYPE_CHECKING:
    from llmc.tune.session import Session

HELP = "search for faster kernel configurations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model, or an artifact folder; not with --import")
    budget = parser.add_argument_group("search")
    budget.add_argument("--trials", type=options.natural, metavar="N", help="configurations to try (default: 64 a kernel; 0: none)")
    budget.add_argument("--minutes", type=float, metavar="M", help="be done within about M minutes")
    budget.add_argument("--kernels", default="*", metavar="PATTERN", help="only kernels or families that fit, such as 'gemv*'")
    budget.add_argument("--resume", action="store_true", help="do not try again what this machine's records already have")
    budget.add_argument(
        "--only",
        choices=("kernels", "whole"),
        help="kernels, or what concerns the whole model: page size, fusion, pieces of work (default: both, in turn)",
    )
    budget.add_argument("--records", type=Path, metavar="DIR", help="folder for the records (default: records in llmc's cache)")
    elsewhere = parser.add_argument_group("a machine without a compiler or a network")
    elsewhere.add_argument(
        "--offline",
        type=Path,
        metavar="DIR",
        help="time nothing: pack candidates and a runner into DIR; with --trials 0 the model, with and without what was found",
    )
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
    if args.only == "whole" and (args.offline is not None or args.kernels != "*"):
        raise UsageError("--only whole runs the model here and has no kernels to pick: give no --offline and no --kernels with it")
    return _tune(args, folder)


def _import(path: Path, folder: Path) -> int:
    from llmc.tune.extract import import_results

    count, notes = import_results(path, folder)
    _warn(notes)
    print(f"{count} lines added to {folder}; compiles use what a model gained by: see --resume, or --offline with --trials 0")
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
    from llmc.errors import UsageError
    from llmc.schedules.lookup import SHIPPED, load
    from llmc.tune import display
    from llmc.tune.extract import pack_offline, records_file
    from llmc.tune.machine import check_target
    from llmc.tune.session import TRIALS, Plan, Session
    from llmc.tune.subject import Subject
    from llmc.tune.task import tasks_of
    from llmc.tune.turns import Turns

    progress = on_stderr(args.quiet)
    compiling = options.compile_options(args)
    target, *more = targets.parse_all(compiling.pop("target"))
    if more:
        raise UsageError(f"one target is tuned at a time, and {1 + len(more)} were named: run `llmc tune` once for each")
    check_target(target, here=args.offline is None)
    seconds = None if args.minutes is None else args.minutes * 60
    plan = Plan([], args.trials, seconds, args.resume, choices=args.only != "kernels" and args.kernels == "*")
    with Subject(args.model, target, compiling, progress) as subject:
        if args.only != "whole":
            plan.tasks = tasks_of(subject.kernels(), target, args.kernels)
        known = load([SHIPPED, folder])
        if args.offline is not None and args.trials == 0:
            from llmc.tune import pack_model

            with progress.phase("artifacts") as phase:
                pack_model.write(args.offline, subject, plan.tasks, known, phase.callback())
            _carry(args.offline, "verdicts.jsonl")
            return 0
        if args.offline is not None:
            problems = pack_offline(args.offline, target, plan.tasks, known, args.trials or TRIALS * len(plan.tasks), progress)
            _warn([*known.notes, *problems])
            _carry(args.offline, "results.jsonl")
            return 0
        session = Session(subject, plan, known, records_file(folder, target), progress, Turns)
        session.run(lambda: display.on_stderr(args.quiet))
    _warn(known.notes)
    _print(session, args.json)
    return 130 if session.interrupted else 0


def _carry(folder: Path, results: str) -> None:
    print(f"{folder}: carry it to the machine, run `python {folder.name}/run.py` there, bring {results} back")


def _print(session: Session, as_json: bool) -> None:
    from llmc.tune.display import summary

    if as_json:
        import json

        print(json.dumps(session.to_json(), indent=1))
        return
    if session.tuner is not None:
        print(summary(session.tuner.states))
    print("\n".join(session.summary()))
    print(f"records in {session.out}; `llmc compile` uses them from now on" + (" (interrupted)" if session.interrupted else ""))
