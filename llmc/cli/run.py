"""Continue a prompt, or answer it if the model has a chat template. The text goes to stdout as it comes, statistics to stderr."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llmc.cli import options, session
from llmc.cli.parser import Parser

HELP = "answer a prompt, streamed"


def add_arguments(parser: Parser) -> None:
    session.add_arguments(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; read from stdin if it is - or left out")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.late = "prompt"
    options.add_output(parser, json="text, token ids and timing")


def main(args: argparse.Namespace) -> int:
    prompt = _prompt(args.prompt)
    model = session.open_model(args)
    from llmc.runtime import Completion

    request = _request(args, prompt, templated=session.has_template(model))
    completion = session.answer(model, request, args, Completion(0, 0), echo=not args.json)
    if args.json:
        import dataclasses
        import json

        print(json.dumps({"model": model.manifest.model.name, "prompt": prompt, **dataclasses.asdict(completion)}))
    elif not completion.text.endswith("\n"):
        print()
    sys.stdout.flush()  # the text stands before the statistics where both streams go to one place
    if not args.quiet:
        print(session.statistics(completion), file=sys.stderr)
    return 0


def _request(args: argparse.Namespace, prompt: str, *, templated: bool) -> Any:
    """The text itself, or the messages that hold it."""
    from llmc.errors import UsageError

    if args.raw or not templated:
        if args.system is not None:
            why = "--raw gives the model nothing but the prompt" if args.raw else f"{args.model} has no chat template"
            raise UsageError(f"--system cannot be used here: {why}")
        return prompt
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def _prompt(text: str | None) -> str:
    """The prompt from the command line or from stdin, without the newline that ends a piped line."""
    from llmc.errors import UsageError

    if text is None and sys.stdin.isatty():
        raise UsageError("no prompt was given: pass it as an argument, pipe it in, or talk to the model with `llmc chat`")
    try:
        if text is None or text == "-":
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        text.encode("utf-8")  # an argument that is not UTF-8 arrives as lone surrogates
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8 text") from None
    return text
