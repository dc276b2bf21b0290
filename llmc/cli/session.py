"""What ``run`` and ``chat`` share: opening a model, streaming an answer to stdout, the line of statistics."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.cli import options

if TYPE_CHECKING:
    from llmc.runtime import Completion, Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the system message, and how to compile, run and sample."""
    parser.add_argument("model", metavar="MODEL", help="artifact folder; or a model, compiled into the cache on first use")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_sampling(parser)
    options.add_runtime(parser)
    options.add_compile(parser)
    options.add_method(parser)


def open_model(args: argparse.Namespace) -> Model:
    """The loaded model that ``args.model`` names, compiled first if need be."""
    from llmc.runtime import load

    return load(artifact(args), threads=args.threads, context=args.context, kv_memory=args.kv_memory)


def artifact(args: argparse.Namespace) -> Path:
    """The artifact folder of ``args.model``, compiled into the cache if it is a model that is not there."""
    from llmc.cache import artifact_for
    from llmc.progress import on_stderr

    return artifact_for(args.model, options.compile_options(args), on_stderr(args.quiet), recompile=args.recompile)


def has_template(model: Model) -> bool:
    """Whether the model can be given messages."""
    tokenizer = model.manifest.tokenizer
    return tokenizer is not None and tokenizer.chat_template is not None


def answer(model: Model, request: Any, args: argparse.Namespace, so_far: Completion, *, echo: bool = True) -> Completion:
    """Continue ``request`` (text or messages), printing each piece as it comes if ``echo``, and adding it to ``so_far``.

    ``so_far`` holds what there is when an interrupt ends the answer early.
    """
    events: Any = model.generate(request, stream=True, **options.sampling_options(args))
    with contextlib.closing(events):
        for event in events:
            so_far.add(event)
            if echo and event.text:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    return so_far


def statistics(completion: Completion) -> str:
    """``12 tokens in, 64 out, first after 0.05 s, 53.1 tok/s, stopped by the length``."""
    from llmc.units import format_seconds

    timing = completion.timing
    if timing is None:
        return f"{completion.prompt_tokens} tokens in, {len(completion.token_ids)} out"
    prefill = f" ({completion.prompt_tokens / timing.prompt:.0f} tok/s)" if timing.prompt > 0 else ""
    speed = f", {timing.tokens_per_second:.1f} tok/s" if timing.tokens_per_second else ""
    ended = "end of the answer" if completion.finish_reason == "stop" else "stopped at the token limit"
    return (
        f"{completion.prompt_tokens} tokens in{prefill}, {len(completion.token_ids)} out, first after "
        f"{format_seconds(timing.first_token)}{speed}, {ended}"
    )
