"""Compare ways of storing a model: size, decode speed and perplexity of each, in a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.cli import options

HELP = "compare quantization schemes: size, speed, perplexity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, smollm2-135m, or hub id")
    parser.add_argument(
        "--compare",
        required=True,
        metavar="WAY,WAY,...",
        help="SCHEME, SCHEME:METHOD (int4_g64:gptq), native, none (float32), or 4.5bpw[:METHOD]",
    )
    parser.add_argument("--against", metavar="MODEL", help="also give KL divergence and top-1 agreement with this one")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to predict, UTF-8 (default: one in the public domain)")
    parser.add_argument("--windows", type=options.positive, metavar="N", help="take N windows of 512 tokens (default: all)")
    parser.add_argument("--target", metavar="SPEC", help="what to compile for (default: cpu)")
    parser.add_argument("--calibration", metavar="FILE", help="text for methods and budgets (default: one in the public domain)")
    options.add_output(parser, json="the rows")


def main(args: argparse.Namespace) -> int:
    from llmc.extras import require
    from llmc.progress import on_stderr

    require("compile", "llmc quantize")
    from llmc.compare import compare, to_json, to_markdown
    from llmc.texts import EVALUATION, read_text

    ways = [way.strip() for way in args.compare.split(",") if way.strip()]
    compiling = {"target": [args.target or "cpu"], "max_batch": 1}
    text = read_text(args.text or EVALUATION)
    rows = compare(
        args.model,
        ways,
        compiling,
        calibration=args.calibration,
        against=args.against,
        text=text,
        windows=args.windows,
        progress=on_stderr(args.quiet),
    )
    print(to_json(rows) if args.json else to_markdown(rows))
    return 0
