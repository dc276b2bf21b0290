"""Write the smallest folder that runs an artifact on one kind of machine: model, native libraries, Python loader, C example."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.cli import options

HELP = "make a deployable folder for one target"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="artifact folder")
    parser.add_argument(
        "--for", dest="target", required=True, metavar="TARGET", help="the variant, such as cpu:x86-64-v3; cpu if there is one"
    )
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist, unless --force"
    )
    parser.add_argument("--force", action="store_true", help="replace the package at DIR")
    options.add_output(parser, json="the report")


def main(args: argparse.Namespace) -> int:
    from llmc.deploy import package
    from llmc.progress import on_stderr
    from llmc.units import format_bytes

    report = package(args.artifact, target=args.target, out=args.out, force=args.force, progress=on_stderr(args.quiet))
    if args.json:
        import json

        sizes = {"bytes": report.total, "weights": report.weights, "tokenizer": report.tokenizer, "runtime": report.runtime}
        print(json.dumps({"out": str(report.out), "target": report.target, **sizes, "seconds": report.seconds}))
    else:
        print(
            f"{report.out}  {format_bytes(report.total)} for {report.target}: weights {format_bytes(report.weights)}, "
            f"tokenizer {format_bytes(report.tokenizer)}, what runs them {format_bytes(report.runtime)}"
        )
    return 0
