"""The ``llmc`` command: finds the subcommand, and turns every way it can end into an exit status.

Nothing but the standard library is imported before a command runs, because ``llmc run ARTIFACT`` must start at once.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from llmc import interrupt
from llmc.cli.parser import Parser
from llmc.errors import InternalError, LlmcError
from llmc.version import __version__

COMMANDS = ("compile", "add", "run", "chat", "inspect", "verify", "package", "eval", "quantize", "bench", "tune", "doctor", "fetch")

INTERRUPTED = 130
TERMINATED = 143
CLOSED_PIPE = 141

EPILOG = """\
exit status:
  0    done
  1    a check failed (verify)
  2    usage: unknown flag, command or target, contradicting options
  3    the model cannot be read
  4    the model holds something llmc cannot compile
  5    the artifact is missing, damaged, or made for another version or machine
  6    the result cannot be written
  7    the request cannot be served (prompt longer than the context, bad sampling value)
  8    an optional package is missing
  70   a defect in llmc; LLMC_DEBUG=1 shows the traceback
  130  interrupted (Ctrl-C); 141 stdout was closed; 143 terminated

A MODEL is a folder with config.json and *.safetensors, a .gguf file, `smollm2-135m`, or a hub id (org/name[@rev]).
"""


def build_parser(command: str | None) -> Parser:
    """The parser. Only the arguments of ``command`` are added, the other commands are there by name and help line."""
    parser = Parser(prog="llmc", description="Compile a decoder model once, then run it anywhere.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"llmc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        if command in COMMANDS and name != command:
            commands.add_parser(name)
            continue
        module = importlib.import_module(f"llmc.cli.{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(action=module.main)
    return parser


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like an exception, so that no half-written folder and no lock is left behind."""
    raise SystemExit(TERMINATED)


def _run(argv: Sequence[str]) -> int:
    command = next((a for a in argv if not a.startswith("-")), None)
    args = build_parser(command).parse_args(argv)
    try:
        status: int = args.action(args)
    except Exception as error:
        if interrupt.heard():  # the error is what a library made of it
            raise KeyboardInterrupt from error
        raise
    sys.stdout.flush()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status. Prints errors, raises none."""
    signal.signal(signal.SIGTERM, _terminate)
    interrupt.listen()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has gone (`llmc run ... | head -1`). The interpreter flushes once more when it exits.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except LlmcError as error:
        if os.environ.get("LLMC_DEBUG"):
            raise
        prefix = "internal error" if isinstance(error, InternalError) else "error"
        print(f"llmc: {prefix}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if os.environ.get("LLMC_DEBUG"):
            raise
        print(
            f"llmc: internal error: {type(error).__name__}: {error}\n"
            "This is a defect in llmc: please report it; rerun with LLMC_DEBUG=1 for the traceback.",
            file=sys.stderr,
        )
        return InternalError.exit_code


def entry() -> None:
    """Run the process's command line and end the process with its exit status.

    CPython ends a process by SIGINT itself, whatever status it was given, if the interrupt fell into code compiled from a string
    (every dataclass has such code); so an interrupted process ends here, once what was registered to run at exit has run.
    """
    status = main()
    if status == INTERRUPTED or interrupt.heard():
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    entry()
