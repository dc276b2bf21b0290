"""``compile``, ``run``, ``chat``, ``bench``, ``verify --against`` on a real, small artifact."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Llmc

GREEDY = ("--raw", "--max-tokens", "12", "--ignore-eos")


@pytest.fixture(scope="module")
def greedy(llmc: Llmc, tiny_artifact: Path) -> str:
    """Twelve greedy tokens after "ab"."""
    done = llmc("run", tiny_artifact, "ab", *GREEDY)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_text_on_stdout_statistics_on_stderr(llmc: Llmc, tiny_artifact: Path, greedy: str) -> None:
    done = llmc("run", tiny_artifact, "ab", *GREEDY)
    assert done.stdout == greedy + "\n"
    assert re.search(r"2 tokens in .*12 out, first after .*tok/s, stopped at the token limit", done.stderr)
    assert llmc("run", tiny_artifact, "ab", *GREEDY, "--quiet").stderr == ""


def test_json_holds_the_same_text(llmc: Llmc, tiny_artifact: Path, greedy: str) -> None:
    done = llmc("run", tiny_artifact, "ab", *GREEDY, "--json")
    found = json.loads(done.stdout)
    assert found["text"] == greedy and len(found["token_ids"]) == 12 and found["finish_reason"] == "length"
    assert found["timing"]["first_token"] > 0


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_prompt_from_stdin(llmc: Llmc, tiny_artifact: Path, greedy: str, arguments: tuple[str, ...]) -> None:
    assert llmc("run", tiny_artifact, *arguments, *GREEDY, stdin="ab\n").stdout == greedy + "\n"


def test_same_seed_same_text(llmc: Llmc, tiny_artifact: Path, greedy: str) -> None:
    hot = (*GREEDY, "--temperature", "1.5", "--seed")
    first, again, other = (llmc("run", tiny_artifact, "ab", *hot, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_stop_ends_before_the_text(llmc: Llmc, tiny_artifact: Path, greedy: str) -> None:
    stop = greedy[2:4]
    done = llmc("run", tiny_artifact, "ab", *GREEDY, "--stop", stop, "--json")
    assert json.loads(done.stdout)["text"] == greedy[: greedy.index(stop)]


def test_threads_do_not_change_the_text(llmc: Llmc, tiny_artifact: Path, greedy: str) -> None:
    assert llmc("run", tiny_artifact, "ab", *GREEDY, "--threads", "1").stdout == greedy + "\n"


def test_template_is_used_unless_raw(llmc: Llmc, tiny_artifact: Path) -> None:
    """The template writes ``[system] s``, ``[user] ab`` and ``[assistant] ``, a byte a token."""
    plain = json.loads(llmc("run", tiny_artifact, "ab", "--max-tokens", "1", "--json").stdout)
    system = json.loads(llmc("run", tiny_artifact, "ab", "--system", "s", "--max-tokens", "1", "--json").stdout)
    assert plain["prompt_tokens"] == len("[user] ab\n[assistant] ")
    assert system["prompt_tokens"] == len("[system] s\n[user] ab\n[assistant] ")


def test_chat_remembers_until_reset(llmc: Llmc, tiny_artifact: Path) -> None:
    script = "ab\n/help\n/reset\nab\n/nonsense\n/exit\nnever\n"
    done = llmc("chat", tiny_artifact, "--max-tokens", "4", "--ignore-eos", stdin=script)
    assert done.returncode == 0, done.stderr
    tokens = re.findall(r"(\d+) tokens in", done.stderr)
    assert tokens == [str(len("[user] ab\n[assistant] "))] * 2
    assert "/reset   forget" in done.stderr and "unknown command /nonsense" in done.stderr
    twice = llmc("chat", tiny_artifact, "--max-tokens", "4", "--ignore-eos", stdin="ab\nab\n")
    first, second = map(int, re.findall(r"(\d+) tokens in", twice.stderr))
    assert second >= 2 * first


def test_chat_goes_on_after_a_turn_that_does_not_fit(llmc: Llmc, tiny_artifact: Path) -> None:
    done = llmc("chat", tiny_artifact, "--max-tokens", "4", stdin=f"{'x' * 300}\nab\n")
    assert done.returncode == 0
    assert "/reset" in done.stderr and len(re.findall(r"tokens in", done.stderr)) == 1


def test_a_model_compiles_into_the_cache_once(llmc: Llmc, tiny_model_dir: Callable[..., Path], tmp_path: Path, greedy: str) -> None:
    arguments = ("run", tiny_model_dir("llama"), "ab", "--dtype", "float32", *GREEDY)
    first = llmc(*arguments, env={"LLMC_CACHE": str(tmp_path)})
    again = llmc(*arguments, env={"LLMC_CACHE": str(tmp_path)})
    assert first.stdout == again.stdout == greedy + "\n", first.stderr
    assert "weights" in first.stderr and "weights" not in again.stderr
    assert len(list((tmp_path / "artifacts").iterdir())) == 1


def test_artifact_runs_wherever_it_is_moved(llmc: Llmc, tiny_artifact: Path, tmp_path: Path, greedy: str) -> None:
    moved = Path(shutil.copytree(tiny_artifact, tmp_path / "else where"))
    assert llmc("run", moved, "ab", *GREEDY).stdout == greedy + "\n"


def test_verify_of_a_real_artifact(llmc_here: Llmc, tiny_artifact: Path, tiny_model_dir: Callable[..., Path]) -> None:
    done = llmc_here("verify", tiny_artifact, "--against", tiny_model_dir("llama"), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and report["logits"]["passed"]
    assert len(report["logits"]["prompts"]) == 3
    assert all(p["max_rel"] < 1e-4 and p["top1"] == 1 and p["greedy"] == p["greedy_of"] for p in report["logits"]["prompts"])


def test_verify_against_another_model_fails(llmc_here: Llmc, tiny_artifact: Path, tiny_model_dir: Callable[..., Path]) -> None:
    done = llmc_here("verify", tiny_artifact, "--against", tiny_model_dir("llama", seed=1))
    assert done.returncode == 1 and "FAILED" in done.stdout


def test_inspect_of_a_real_artifact(llmc: Llmc, tiny_artifact: Path) -> None:
    done = llmc("inspect", tiny_artifact, "--memory", "1GB")
    assert done.returncode == 0 and "96 positions" in done.stdout
    for function in ("decode", "extend"):
        assert re.search(rf"^  {function} +\d+ kernels, workspace", done.stdout, re.M)
    assert "cpu.linear" in done.stdout


def test_bench_of_a_real_artifact(llmc: Llmc, tiny_artifact: Path) -> None:
    done = llmc("bench", tiny_artifact, "-p", "32", "-n", "8", "-r", "2", "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["test"] for r in rows] == ["pp32", "tg8"] and all(r["tokens_per_second"] > 0 for r in rows)
    assert rows[1]["percent_of_limit"] > 0
