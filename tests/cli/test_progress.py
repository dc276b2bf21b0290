"""Progress: lines where there is no terminal, bars where there is one, nothing when quiet, stdout never touched."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from llmc.progress import PlainProgress, SilentProgress, on_stderr

TWO_PHASES = """
import sys
from llmc.progress import on_stderr
progress = on_stderr()
with progress.phase("weights", total=2_000_000, unit="B") as phase:
    phase.advance(500_000)
    phase.update(2_000_000, "model.embed")
progress.note("a [note] with brackets")
try:
    with progress.phase("failing"):
        raise ValueError
except ValueError:
    pass
print("result")
"""


def test_plain_prints_a_line_for_each_finished_phase() -> None:
    out = io.StringIO()
    progress = PlainProgress(out)
    with progress.phase("graph"):
        pass
    with pytest.raises(ValueError), progress.phase("broken"):
        raise ValueError
    assert re.fullmatch(r"graph  \d+\.\d s\n", out.getvalue())


def test_phase_counts() -> None:
    with SilentProgress().phase("x", total=10) as phase:
        phase.advance()
        phase.advance(3)
        assert phase.done == 4
        phase.callback()(7, 20, "name")
        assert (phase.done, phase.total) == (7, 20)


def test_quiet_and_piped_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(on_stderr(quiet=True), SilentProgress)
    progress = on_stderr()
    assert isinstance(progress, PlainProgress)
    progress.note("hello")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "hello\n"


def test_a_pipe_sees_only_results() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_PHASES], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "result\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("weights  ") and lines[1:] == ["a [note] with brackets"]


def test_a_terminal_sees_bars_that_become_lines() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_PHASES],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux says so when the other side has closed
            break
        if not piece:
            break
        shown += piece
    assert process.communicate(timeout=60)[0] == b"result\n" and process.returncode == 0
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "✓ weights" in text and "2.0/2.0 MB" in text and "a [note] with brackets" in text
    assert "✓ failing" not in text
