"""Compile an artifact's model for one more target, into the artifact: weights and tokenizer are shared."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.cli import options

HELP = "add a variant for another target to an artifact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="OUT", help="artifact folder")
    parser.add_argument("--target", action="append", required=True, metavar="SPEC", help="as for `llmc compile`; may be repeated")
    parser.add_argument("--model", metavar="MODEL", help="where the model is now (default: where the artifact was compiled from)")
    parser.add_argument("--records", type=Path, metavar="DIR", help="use the tuning records of DIR too (see `llmc tune`)")
    options.add_output(parser, json="the report")


def main(args: argparse.Namespace) -> int:
    from llmc.extras import require
    from llmc.progress import on_stderr

    require("compile", "llmc add")
    from llmc.add_variant import add
    from llmc.units import format_bytes

    report = add(args.artifact, target=args.target, model=args.model, records=args.records, progress=on_stderr(args.quiet))
    names = [variant.target for variant in report.manifest.variants]
    if args.json:
        import json

        print(json.dumps({"out": str(report.out), "bytes": report.bytes, "seconds": report.seconds, "target": names}))
    else:
        seconds = sum(report.seconds.values())
        print(f"{report.out}  {format_bytes(report.bytes)}  in {seconds:.1f} s, for {', '.join(names)}")
    return 0
