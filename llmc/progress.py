"""Progress by phase, on stderr. Results go to stdout, so a pipe never sees any of this.

A long operation takes a :class:`Progress` and wraps each of its phases::

    with progress.phase("weights", total=nbytes, unit="B") as phase:
        for tensor in tensors:
            phase.advance(tensor.nbytes)

:func:`on_stderr` chooses the kind: bars on a terminal, one line per finished phase elsewhere, nothing with ``--quiet``.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TextIO

from llmc import interrupt

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

Callback = Callable[[int, int, str], None]


class Phase:
    """One running phase. ``total`` counts units (bytes if ``unit`` is ``"B"``), or is None where no count is known."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more units as done."""
        self.update(self.done + n)

    def update(self, done: int, what: str = "", total: int | None = None) -> None:
        """Set the units done so far; ``what`` names the item at hand; ``total`` replaces the phase's total."""
        self.done = done
        if total is not None:
            self.total = total
        self._show(what)

    def callback(self) -> Callback:
        """This phase as a plain function ``(done, total, what)``, for code that knows nothing of progress."""
        return lambda done, total, what: self.update(done, what, total or None)

    def _show(self, what: str) -> None:
        """Draw the state; phases without a display have nothing to draw."""


class Progress(ABC):
    """Where the phases of one operation are shown."""

    @abstractmethod
    def phase(self, title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """A context manager that yields the :class:`Phase`; the phase counts as finished when it is left without an error."""

    @abstractmethod
    def note(self, message: str) -> None:
        """A line the user should see: a warning, or what is being waited for."""


class SilentProgress(Progress):
    """Shows nothing."""

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        yield Phase(title, total, unit)

    def note(self, message: str) -> None:
        """Nothing is shown."""


class PlainProgress(Progress):
    """One line per finished phase, for logs and pipes: ``weights 1.2 s``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        start = time.perf_counter()
        yield Phase(title, total, unit)
        self.note(f"{title}  {time.perf_counter() - start:.1f} s")

    def note(self, message: str) -> None:
        print(message, file=self._stream, flush=True)


class RichProgress(Progress):
    """A bar for the running phase, which becomes a line once it has finished. Needs a terminal on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichBars

        start = time.perf_counter()
        count = DownloadColumn(binary_units=False) if unit == "B" else MofNCompleteColumn()
        counted = [BarColumn(bar_width=32), count] if total is not None or unit else []
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *counted,
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[what]}"),
        ]
        bars = RichBars(*columns, console=self._console, transient=True)
        with bars:
            yield _RichPhase(title, total, unit, bars, bars.add_task(title, total=total, what=""))
        self._console.print(f"[green]✓[/green] {title}  [dim]{time.perf_counter() - start:.1f} s[/dim]")

    def note(self, message: str) -> None:
        self._console.print(message, markup=False)


class _RichPhase(Phase):
    def __init__(self, title: str, total: int | None, unit: str, bars: RichBars, task: TaskID) -> None:
        super().__init__(title, total, unit)
        self._bars = bars
        self._task = task

    def _show(self, what: str) -> None:
        self._bars.update(self._task, completed=self.done, total=self.total, what=what)


class Clock:
    """Times phases while showing them; ``seconds`` by title, of the same title added up."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        interrupt.check()
        start = time.perf_counter()
        with self.progress.phase(title, total, unit) as phase:
            yield phase
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start


def on_stderr(quiet: bool = False) -> Progress:
    """Bars if stderr is a terminal, lines if it is not, nothing if ``quiet``. rich is imported for a terminal only."""
    if quiet:
        return SilentProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
