"""Fetch a model into the cache and print where it is. Fetching a hub id again brings the newest revision."""

from __future__ import annotations

import argparse

from llmc.cli import options

HELP = "fetch a model by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="smollm2-135m, or a hub id (org/name[@rev])")
    options.add_output(parser, json="the name and the path")


def main(args: argparse.Namespace) -> int:
    from llmc.extras import require
    from llmc.progress import on_stderr

    require("compile", "llmc fetch")
    from llmc.importer.resolve import resolve

    with on_stderr(args.quiet).phase(f"fetch {args.name}", unit="B") as phase:
        source = resolve(args.name, progress=phase.callback())
    if args.json:
        import json

        print(json.dumps({"name": args.name, "path": str(source.path)}))
    else:
        print(source.path)
    return 0
