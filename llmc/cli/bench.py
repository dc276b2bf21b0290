"""Time prefill (pp) and generation (tg) as llama-bench does, beside the memory bandwidth measured in the same run."""

from __future__ import annotations

import argparse

from llmc.cli import options

HELP = "time prefill and generation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="artifact folder; or a model, compiled into the cache on first use")
    parser.add_argument(
        "-p", dest="prompts", type=_lengths, default=[512], metavar="N[,N]", help="prompt lengths (default: 512; 0: none)"
    )
    parser.add_argument(
        "-n", dest="generations", type=_lengths, default=[128], metavar="N[,N]", help="tokens (default: 128; 0: none)"
    )
    parser.add_argument(
        "-r", dest="repeats", type=options.positive, default=5, metavar="N", help="repeats of each test (default: 5)"
    )
    parser.add_argument("--format", choices=("md", "json", "csv"), default="md", help="how to print the results (default: md)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--threads", type=options.positive, metavar="N", help="CPU threads (default: one per physical core)")
    parser.add_argument("--recompile", action="store_true", help="compile again even if the cache holds this model")
    options.add_compile(parser)
    options.add_method(parser)


def _lengths(text: str) -> list[int]:
    """``128,512`` as numbers; ``0`` as none."""
    return [options.positive(part) for part in text.split(",") if part != "0"]


def main(args: argparse.Namespace) -> int:
    from llmc.bench import FORMATS, run
    from llmc.cli.session import artifact
    from llmc.progress import on_stderr

    progress = on_stderr(args.quiet)
    tests = {"prompts": args.prompts, "generations": args.generations, "repeats": args.repeats}
    results = run(artifact(args), progress, threads=args.threads, **tests)
    print(FORMATS[args.format](results))
    return 0
