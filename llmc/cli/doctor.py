"""Show what is installed, which targets can be built and run here, and the command for whatever is missing."""

from __future__ import annotations

import argparse

HELP = "show what is installed and what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(args: argparse.Namespace) -> int:
    from llmc.doctor import examine, render

    report = examine()
    if args.json:
        import dataclasses
        import json

        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        print(render(report))
    return 0
