"""Compile a model into an artifact: a folder that runs anywhere its target does, with no compiler installed."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.cli import options

HELP = "compile a model into an artifact folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, smollm2-135m, or hub id")
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="OUT", help="folder to write; must not exist, unless --force"
    )
    options.add_compile(parser)
    options.add_method(parser)
    parser.add_argument(
        "--context", type=options.positive, metavar="N", help="most positions of a sequence (default: the model's own)"
    )
    parser.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the IR after every pass, and the passes' times")
    parser.add_argument("--records", type=Path, metavar="DIR", help="use the tuning records of DIR too (see `llmc tune`)")
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    options.add_output(parser, json="the report")


def main(args: argparse.Namespace) -> int:
    from llmc.extras import require
    from llmc.progress import on_stderr

    require("compile", "llmc compile")
    from llmc.compiler import compile as compile_model
    from llmc.passes.quantize.report import bits_per_weight, table
    from llmc.units import format_bytes

    progress = on_stderr(args.quiet)
    report = compile_model(
        args.model,
        out=args.out,
        context=args.context,
        records=args.records,
        dump_ir=args.dump_ir,
        force=args.force,
        progress=progress,
        **options.compile_options(args),
    )
    for line in table(report.weights):
        progress.note(line)
    kv = report.manifest.kv
    progress.note(f"KV cache  {kv.storage}, {format_bytes(kv.bytes_per_token)} a token")
    if names := report.unused:
        rest = ", ..." if len(names) > 8 else ""
        progress.note(f"{len(names)} tensors unused by the graph: {', '.join(names[:8])}{rest}")
    if args.json:
        import json
        from dataclasses import asdict

        print(
            json.dumps(
                {
                    "out": str(report.out),
                    "bytes": report.bytes,
                    "seconds": report.seconds,
                    "unused": report.unused,
                    "target": [variant.target for variant in report.manifest.variants],
                    "parameters": report.manifest.model.parameters,
                    "bits_per_weight": bits_per_weight(report.weights),
                    "kv": {"dtype": kv.dtype, "bits": kv.bits, "bytes_per_token": kv.bytes_per_token},
                    "weights": [asdict(row) for row in report.weights],
                }
            )
        )
    else:
        print(f"{report.out}  {format_bytes(report.bytes)}  in {sum(report.seconds.values()):.1f} s")
    return 0
