"""Check an artifact: sizes and sha256 of every file and, with --against, its logits against transformers in float32."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from llmc.cli import options

HELP = "check an artifact's files, and its logits against the model's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="artifact folder")
    parser.add_argument("--against", metavar="MODEL", help="compare logits with this model, run by transformers in float32")
    parser.add_argument("--threads", type=options.positive, metavar="N", help="CPU threads (default: one per physical core)")
    options.add_output(parser, json="the report")


def main(args: argparse.Namespace) -> int:
    from llmc.progress import on_stderr
    from llmc.units import format_bytes
    from llmc.verify import compare, verify_files

    progress = on_stderr(args.quiet)
    files = verify_files(args.artifact, progress)
    comparison = (
        compare(args.artifact, args.against, progress, threads=args.threads) if args.against and not files.problems else None
    )
    good = not files.problems and (comparison is None or comparison.passed)
    if args.json:
        import json

        logits = None if comparison is None else dataclasses.asdict(comparison) | {"passed": comparison.passed}
        print(json.dumps({"ok": good, "files": dataclasses.asdict(files), "logits": logits}))
        return 0 if good else 1
    for problem in files.problems:
        print(f"FAILED  {problem}")
    if not files.problems:
        print(f"ok      {files.files} files, {format_bytes(files.bytes)}")
    elif args.against:
        print("        logits were not compared, because the files are not what was compiled: compile the model again")
    for p in comparison.prompts if comparison else ():
        print(
            f"        {p.prompt!r}: {p.tokens} tokens, max error {p.max_abs:.2e} ({p.max_rel:.2e} relative), "
            f"top-1 {p.top1:.1%}, greedy {p.greedy}/{p.greedy_of} equal"
        )
    if comparison:
        rule = f"relative error at most {comparison.tolerance:g}" + (
            " and equal greedy tokens" if comparison.dtype == "float32" else ""
        )
        print(f"{'ok' if comparison.passed else 'FAILED':<8}logits, weights in {comparison.dtype}: {rule}")
    return 0 if good else 1
