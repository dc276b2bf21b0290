"""Measure a compiled model on a text: perplexity and, with --against, KL divergence and top-1 agreement with another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import options

if TYPE_CHECKING:
    from llmc.evaluate import Estimate

HELP = "measure perplexity, and the distance from another model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="artifact folder; or a model, compiled into the cache on first use")
    parser.add_argument(
        "--against", metavar="MODEL", help="compare with this artifact, or with this model, run by transformers in float32"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to predict, UTF-8 (default: one in the public domain)")
    parser.add_argument("--window", type=options.positive, default=512, metavar="N", help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=options.positive, metavar="N", help="take N windows, spread over the text (default: all)")
    parser.add_argument("--threads", type=options.positive, metavar="N", help="CPU threads (default: one per physical core)")
    parser.add_argument("--recompile", action="store_true", help="compile again even if the cache holds this model")
    options.add_output(parser, json="the figures")
    options.add_compile(parser)
    options.add_method(parser)


def main(args: argparse.Namespace) -> int:
    from llmc.cli.session import artifact
    from llmc.evaluate import CONFIDENCE, evaluate, predictor, text_windows
    from llmc.progress import on_stderr
    from llmc.runtime import load
    from llmc.texts import EVALUATION, read_text

    progress = on_stderr(args.quiet)
    text = read_text(args.text or EVALUATION)
    folder = artifact(args)
    reference = None
    if args.against is not None:
        with progress.phase("load reference"):
            reference = predictor(args.against, context=args.window, threads=args.threads)
    with load(folder, threads=args.threads) as model:
        texts = text_windows(model, text, args.window, args.windows)
        (found,) = evaluate([model], texts, reference, progress)
    if args.json:
        import json
        from dataclasses import asdict

        print(json.dumps({**asdict(found), "confidence": CONFIDENCE}))
        return 0
    print(f"perplexity     {_interval(found.perplexity, '.3f')}")
    if (beside := found.against) is not None:
        print(f"  reference    {_interval(beside.perplexity, '.3f')}")
        print(f"  ratio        {_interval(beside.ratio, '.4f')}")
        print(f"KL divergence  {_interval(beside.kl, '.4f')}  nats per token")
        print(f"top-1 equal    {_interval(beside.top1, '.2%')}")
    if not args.quiet:
        progress.note(
            f"{found.tokens} tokens in {found.windows} windows of {found.window}; intervals of {CONFIDENCE:.0%} over windows"
        )
    return 0


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}}  [{estimate.low:{form}}, {estimate.high:{form}}]"
