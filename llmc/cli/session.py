"""What ``run`` and ``chat`` share: opening a model, streaming an answer to stdout, the line of statistics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmc.cli import options

if TYPE_CHECKING:
    from llmc.runtime import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="artifact folder; or a model, compiled into the cache on first use")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_sampling(parser)
    options.add_runtime(parser)
    options.add_compile(parser)


def open_model(args: argparse.Namespace) -> Model:
    """The loaded model that ``args.model`` names, compiled first if need be."""
    from llmc.cache import artifact_for
    from llmc.progress import on_stderr
    from llmc.runtime import load

    folder = artifact_for(args.model, options.compile_options(args), on_stderr(args.quiet), recompile=args.recompile)
    return load(folder, threads=args.threads, kv_memory=args.kv_memory)


def has_template(model: Model) -> bool:
    tokenizer = model.manifest.tokenizer
    return tokenizer is not None and tokenizer.chat_template is not None


def stream(model: Model, request: Any, args: argparse.Namespace, *, echo: bool = True) -> Iterator[Any]:
    """Generate, printing each piece of text as it comes if ``echo``; yields the events of ``Model.generate``."""
    for event in model.generate(request, stream=True, **options.sampling_options(args)):
        if echo and event.text:
            sys.stdout.write(event.text)
            sys.stdout.flush()
        yield event
