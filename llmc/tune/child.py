"""A process that answers JSON objects, a line each, and may crash or hang doing so: :class:`Child` is the end that asks."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO


class ChildEnded(Exception):
    """The process crashed or gave no answer in time, and is no more. The text says which."""


class Child:
    """``python -m module``, which reads a message a line and answers each in :func:`answer_all`."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a message. Raises ChildEnded if there is none within ``seconds``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise ChildEnded(f"no answer within {seconds:g} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self.close()
            raise ChildEnded(f"the process ended with status {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _pump(stream: TextIO, answers: queue.Queue[str]) -> None:
    """Lines to the queue; an empty one once the process has ended."""
    try:
        for line in stream:
            answers.put(line)
    except ValueError:
        pass  # closed by the other thread
    answers.put("")


def answer_all(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer messages until there are no more. What anything prints must not get between the answers: the real stdout is kept for
    them, stdout goes to stderr."""
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        sink.write(json.dumps(answer(json.loads(line))) + "\n")
        sink.flush()
