"""The command line itself: help, unknown words, exit statuses, broken pipes, start-up cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.cli import main as cli
from llmc.cli.main import COMMANDS, build_parser
from llmc.errors import InternalError, RequestError
from tests.cli.conftest import Llmc


def parse(*arguments: str) -> object:
    return build_parser(arguments[0]).parse_args(list(arguments))


def test_help_names_every_command_and_exit_status(llmc: Llmc) -> None:
    done = llmc("--help")
    assert done.returncode == 0 and done.stderr == ""
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", done.stdout, re.M), command
    assert "exit status" in done.stdout and "130" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert "usage: llmc " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compil", "x"], ["unknown command 'compil'", "did you mean compile"]),
        (["run", "m", "--thread", "3"], ["--thread", "did you mean --threads"]),
        (["run", "m", "--temprature=3", "hi"], ["--temprature=3", "did you mean --temperature"]),
        (["compile", "m", "-o", "o", "--dtype", "float23"], ["'float23'", "did you mean float32"]),
        (["compile", "m"], ["-o"]),
        (["run", "m", "one", "two"], ["unknown argument two"]),
        (["run", "m", "x", "--max-tokens", "0"], ["--max-tokens", "at least 1"]),
        (["inspect", "m", "--memory", "8 bananas"], ["--memory", "8 bananas"]),
        (["bench", "m", "-p", "abc"], ["-p", "abc"]),
    ],
)
def test_usage_errors_say_what_was_meant(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert len(captured.err.strip().splitlines()) == 2
    for word in words:
        assert word in captured.err


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["run", "m", "hi"], "hi"),
        (["run", "m", "--seed", "3", "hi"], "hi"),
        (["run", "--seed", "3", "m", "hi", "--raw"], "hi"),
        (["run", "m", "--raw", "--", "--dashes"], "--dashes"),
        (["run", "m"], None),
        (["run", "m", "-"], "-"),
    ],
)
def test_flags_and_prompt_in_any_order(arguments: list[str], prompt: str | None) -> None:
    args = parse(*arguments)
    assert (args.model, args.prompt) == ("m", prompt)  # type: ignore[attr-defined]


def test_counts_and_sizes_take_units() -> None:
    assert parse("compile", "m", "-o", "o", "--context", "32K").context == 32768  # type: ignore[attr-defined]
    assert parse("run", "m", "--kv-memory", "2GB").kv_memory == 2 * 10**9  # type: ignore[attr-defined]
    assert parse("bench", "m", "-p", "128,1K", "-n", "0").prompts == [128, 1024]  # type: ignore[attr-defined]
    assert parse("bench", "m", "-p", "128,1K", "-n", "0").generations == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (RequestError("the prompt is too long"), 7, "llmc: error: the prompt is too long"),
        (InternalError("the graph is not well formed"), 70, "llmc: internal error: the graph is not well formed"),
        (ZeroDivisionError("division by zero"), 70, "LLMC_DEBUG=1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_ending_has_its_status(
    raised: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise raised

    monkeypatch.delenv("LLMC_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([]) == status
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err


def test_debug_shows_the_traceback(llmc: Llmc, tmp_path: Path) -> None:
    plain = llmc("inspect", tmp_path)
    debug = llmc("inspect", tmp_path, env={"LLMC_DEBUG": "1"})
    assert plain.returncode == 5 and "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr and "ArtifactError" in debug.stderr


def test_closed_pipe_is_silent(artifact: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "llmc.cli.main", "inspect", str(artifact), "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_module_and_script_are_the_same_command() -> None:
    script = Path(sys.executable).with_name("llmc")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"llmc {cli.__version__}\n"


def test_starting_imports_nothing_heavy() -> None:
    """What ``llmc run`` costs before it opens the model: the runtime's promise of a first token within 1.5 s starts here."""
    code = (
        "import sys; from llmc.cli.main import build_parser; build_parser('run').parse_args(['run', 'm', 'hi'])\n"
        "heavy = {'numpy', 'tvm', 'tvm_ffi', 'torch', 'transformers', 'rich', 'jinja2', 'tokenizers', 'filelock'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
