"""argparse with two habits of its own: what is unknown is named with its closest match, and abbreviations are not guessed."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, after one usage line, with exit status 2."""

    late: str | None = None
    """An optional positional that may also come after flags: argparse gives up on it once it has seen the first flag."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, but what is left over is this parser's error: a subcommand reports its own unknown flags."""
        namespace, extra = super().parse_known_args(args, namespace)
        if self.late and extra and getattr(namespace, self.late) is None and (extra[0] == "--" or not extra[0].startswith("-")):
            value, *extra = extra[1:] if extra[0] == "--" else extra
            setattr(namespace, self.late, value)
        if extra:
            self.error(f"unknown argument {extra[0]}{self._closest(extra[0].split('=')[0], self._flags())}")
        return namespace, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(c) for c in action.choices]
            what = "command" if isinstance(action, argparse._SubParsersAction) else f"value for {'/'.join(action.option_strings)}"
            self.error(f"unknown {what} {value!r}{self._closest(str(value), choices)} (there is: {', '.join(choices)})")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"usage: {self.prog} ... (see {self.prog} --help)\nllmc: error: {message}\n")

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    @staticmethod
    def _closest(word: str, among: Sequence[str]) -> str:
        found = difflib.get_close_matches(word, among, n=1, cutoff=0.6)
        return f": did you mean {found[0]}?" if found else ""
