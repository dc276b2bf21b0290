"""Show what an artifact is, from its manifest: no weight is read, no GPU is needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.cli import options

HELP = "show what an artifact is and what it needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="artifact folder")
    parser.add_argument(
        "--memory", type=options.memory, metavar="SIZE", help="show the longest context that fits into SIZE, such as 8GB"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def main(args: argparse.Namespace) -> int:
    from llmc.inspect_artifact import describe, render

    if args.json:
        import json

        print(json.dumps(describe(args.artifact, args.memory), indent=1))
    else:
        print(render(args.artifact, args.memory))
    return 0
