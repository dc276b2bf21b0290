"""How a search is shown: a live table on a terminal, a line for each batch elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.table import Table

    from llmc.tune.tuner import State

COLUMNS = ("kernel", "best, us", "rate", "of roofline", "against default", "trials", "failed", "above roofline, ms")


class Show(Protocol):
    """Called with all states and what was just done."""

    def __call__(self, states: list[State], what: str) -> None: ...


def row(state: State) -> tuple[str, ...]:
    """One task's cells, for its first size. The last: milliseconds a prompt and its answer spend above the roofline here."""
    label, best = state.task.label, state.best
    if best is None:
        return (label, "", "", "", "", str(state.trials), str(len(state.failed)), "")
    seconds, roofline, symbols = state.seconds[best][0], state.roofline[0], state.task.sizes[0]
    moved, flops = state.task.family.roofline(state.task.call, **symbols)
    compute = flops / moved > 50
    rate = f"{flops / seconds / 1e9:,.0f} GFLOP/s" if compute else f"{moved / seconds / 1e9:,.1f} GB/s"
    tried = f"{len(state.seconds) + len(state.failed)}/{len(state.candidates)}"
    share, gain, excess = f"{roofline / seconds:.0%}", f"{state.gain:.2f}x", f"{state.excess * 1e3:.2f}"
    return (label, f"{seconds * 1e6:,.2f}", rate, share, gain, tried, str(len(state.failed)), excess)


def _table(states: list[State], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for state in states:
        table.add_row(*row(state))
    return table


@contextmanager
def on_stderr(quiet: bool) -> Iterator[Show]:
    """A function to call after every change: a table that is drawn again, a line, or nothing."""
    if quiet:
        yield lambda states, what: None
        return
    start = time.monotonic()
    if not sys.stderr.isatty():
        yield lambda states, what: print(_line(states, what, time.monotonic() - start), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:

        def draw(states: list[State], what: str) -> None:
            trials = sum(s.trials for s in states)
            live.update(
                _table(states, f"{time.monotonic() - start:.0f} s, {trials} trials, now {what}; Ctrl-C keeps what is found")
            )
            live.refresh()

        yield draw


def _line(states: list[State], what: str, seconds: float) -> str:
    state = next((s for s in states if what.startswith(s.task.label)), states[0])
    cells = [f"{name} {cell}" for name, cell in zip(COLUMNS[1:], row(state)[1:], strict=True) if cell]
    return f"{seconds:6.1f} s  {what}: {', '.join(cells)}"


def summary(states: list[State]) -> str:
    """The table as plain text."""
    lines = [COLUMNS, *(row(s) for s in states)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines
    )
