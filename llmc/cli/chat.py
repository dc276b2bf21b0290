"""Talk to a model, turn by turn. Ctrl-C ends an answer, Ctrl-D or /exit the conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmc import interrupt
from llmc.cli import session

if TYPE_CHECKING:
    from llmc.runtime import Model

HELP = "talk to a model"
COMMANDS = """\
/reset   forget the conversation
/help    this list
/exit    leave (as does Ctrl-D); Ctrl-C ends an answer early"""
HISTORY_LINES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no statistics on stderr")


def main(args: argparse.Namespace) -> int:
    from llmc.errors import UsageError

    model = session.open_model(args)
    if not session.has_template(model):
        raise UsageError(
            f"{args.model} has no chat template, so it cannot chat: continue a text with `llmc run --raw {args.model}`"
        )
    with _history():
        _converse(model, args)
    return 0


def _converse(model: Model, args: argparse.Namespace) -> None:
    """Read, answer, remember, until the input ends. A turn that cannot be served is reported and forgotten."""
    from llmc.errors import RequestError
    from llmc.runtime import Completion

    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(start)
    if sys.stdin.isatty():
        print(f"{model.manifest.model.name}: /help lists the commands", file=sys.stderr)
    while (line := _read()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            print("the conversation was forgotten", file=sys.stderr)
        elif line.startswith("/"):
            print(COMMANDS if line == "/help" else f"unknown command {line.split()[0]}\n{COMMANDS}", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            completion = Completion(0, 0)
            try:
                session.answer(model, messages, args, completion)
            except RequestError as error:
                messages.pop()
                print(f"llmc: error: {error} (/reset forgets the conversation)", file=sys.stderr)
                continue
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                interrupt.forget()
            print(flush=True)
            messages.append({"role": "assistant", "content": completion.text})
            if not args.quiet:
                print(session.statistics(completion), file=sys.stderr)


def _read() -> str | None:
    """The next line, stripped; None at the end of the input. A prompt is shown on a terminal only."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with a history that outlives the session, on a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    from llmc.paths import cache_root

    file = cache_root() / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        # A history that cannot be kept is no reason to fail.
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
