"""What users get wrong, end to end: each ends with its exit status and one sentence that says what, where and what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from llmc import manifest
from tests.cli.conftest import Llmc, save

MakeModel = Callable[..., Path]


def check(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One error line, the expected status, nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("llmc: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# the model


@pytest.mark.parametrize("command", [("run", "{}", "hi"), ("compile", "{}", "-o", "{}-out")])
def test_missing_path(llmc_here: Llmc, tmp_path: Path, command: tuple[str, ...]) -> None:
    missing = str(tmp_path / "no-such-model")
    check(llmc_here(*(c.format(missing) for c in command)), 3, missing)


def test_not_a_model(llmc_here: Llmc, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    check(llmc_here("compile", tmp_path, "-o", tmp_path / "out"), 3, str(tmp_path), "config.json")


def test_truncated_safetensors(llmc_here: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    model = copy(tiny_model_dir("llama"), tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    check(llmc_here("compile", model, "-o", tmp_path / "out"), 3, "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_truncated_gguf(llmc_here: Llmc, smollm2_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with smollm2_gguf.open("rb") as whole:
        short.write_bytes(whole.read(8 << 20))
    check(llmc_here("compile", short, "-o", tmp_path / "out"), 3, "short.gguf")


def test_damaged_tokenizer(llmc_here: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    """Found before the graph is imported, which for a large model is minutes before its artifact is complete."""
    model = copy(tiny_model_dir("llama"), tmp_path)
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes()[:600])
    done = llmc_here("compile", model, "-o", tmp_path / "out")
    check(done, 3, "tokenizer.json", "download it again")
    assert "import graph" not in done.stderr and not (tmp_path / "out").exists()


def test_nan_weights(llmc_here: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    model = copy(tiny_model_dir("llama"), tmp_path)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, _ = json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    data[8 + length + start : 8 + length + start + 4] = np.float32("nan").tobytes()
    weights.write_bytes(data)
    check(llmc_here("compile", model, "-o", tmp_path / "out"), 3, "up_proj", "NaN")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"] or sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "copy"]


def test_unsupported_model(llmc_here: Llmc, tmp_path: Path) -> None:
    """A state-space model: transformers builds it, and its operators are not those of a decoder with attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=101, hidden_size=24, state_size=4, num_hidden_layers=1, time_step_rank=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    check(llmc_here("compile", tmp_path / "model", "-o", tmp_path / "out"), 4)


def test_unknown_target(llmc_here: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    check(llmc_here("compile", tiny_model_dir("llama"), "-o", tmp_path / "out", "--target", "cpu:x86-64-v33"), 2, "cpu:x86-64-v3")
    check(llmc_here("compile", tiny_model_dir("llama"), "-o", tmp_path / "out", "--target", "toaster"), 2, "toaster", "cpu")


def test_missing_extra(llmc: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    """Hidden from the import system, torch is as good as not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None", encoding="utf-8")
    done = llmc("compile", tiny_model_dir("llama"), "-o", tmp_path / "out", env={"PYTHONPATH": str(tmp_path)})
    check(done, 8, "torch", 'pip install "llmc[compile]"')


# the output


def test_read_only_output(llmc_here: Llmc, tiny_model_dir: MakeModel) -> None:
    """/sys takes no new folders, from root neither."""
    check(llmc_here("compile", tiny_model_dir("llama"), "-o", "/sys/llmc-test"), 6, "/sys/llmc-test")


def test_disk_full(llmc_here: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: both refuse the write in the middle of a file."""
    model, out = tiny_model_dir("llama"), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    try:
        done = llmc_here("compile", model, "-o", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check(done, 6, str(out), "no room")
    assert {p.name for p in tmp_path.iterdir()} <= {".out.lock"}


def test_two_compiles_into_one_folder(llmc_here: Llmc, tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.lock"):
        check(llmc_here("compile", tiny_model_dir("llama"), "-o", tmp_path / "out"), 6, "another llmc", str(tmp_path / "out"))


def test_output_that_is_taken(llmc_here: Llmc, tiny_model_dir: MakeModel, tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    before = (tiny_artifact / "manifest.json").read_bytes()
    check(llmc_here("compile", tiny_model_dir("llama"), "-o", tiny_artifact), 6, "--force")
    check(llmc_here("compile", tiny_model_dir("llama"), "-o", tmp_path, "--force"), 6, "other things")
    assert (tiny_artifact / "manifest.json").read_bytes() == before and (tmp_path / "letter.txt").exists()


def test_ctrl_c_leaves_nothing(tiny_model_dir: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc.cli.main", "compile", str(tiny_model_dir("llama")), "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(tmp_path.glob(".out.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr and stderr.rstrip().endswith("interrupted")
    assert {p.name for p in tmp_path.iterdir()} <= {".out.lock"}


# the artifact


def test_artifact_for_another_architecture(llmc: Llmc, tiny_artifact: Path, tmp_path: Path) -> None:
    folder = copy(tiny_artifact, tmp_path)
    info = manifest.read(folder)
    arm = dataclasses.replace(info.variants[0], target="cpu:aarch64+neon", triple="aarch64-linux-gnu", features=["asimd"])
    save(folder, info, variants=[arm])
    check(llmc("run", folder, "hi"), 5, "cpu:aarch64+neon", "x86_64", "llmc add")


def test_artifact_for_a_better_processor(llmc: Llmc, tiny_artifact: Path, tmp_path: Path) -> None:
    folder = copy(tiny_artifact, tmp_path)
    info = manifest.read(folder)
    better = dataclasses.replace(info.variants[0], features=[*info.variants[0].features, "avx4096"])
    save(folder, info, variants=[better])
    check(llmc("run", folder, "hi"), 5, "avx4096", "llmc add")


@pytest.mark.parametrize(("change", "words"), [({"llmc": "99.0.0"}, "99.0.0"), ({"tvm": "0.99.0"}, "0.99.0")], ids=["llmc", "tvm"])
def test_artifact_of_another_version(llmc: Llmc, tiny_artifact: Path, tmp_path: Path, change: dict[str, str], words: str) -> None:
    folder = copy(tiny_artifact, tmp_path)
    # the runtime library it carries would do; without it the installed one must fit
    shutil.rmtree(folder / "runtime", ignore_errors=True)
    info = manifest.read(folder)
    files = {name: file for name, file in info.files.items() if not name.startswith("runtime/")}
    save(folder, info, files=files, **change)
    check(llmc("run", folder, "hi"), 5, words, "llmc compile")


@pytest.mark.parametrize("pattern", ["weights/*", "variants/*/lib.so", "tokenizer/tokenizer.json"])
def test_damaged_file(llmc: Llmc, tiny_artifact: Path, tmp_path: Path, pattern: str) -> None:
    folder = copy(tiny_artifact, tmp_path)
    victim = next(folder.glob(pattern))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    check(llmc("run", folder, "hi"), 5, victim.name, "damaged")


# the request


def test_prompt_longer_than_the_context(llmc: Llmc, tiny_artifact: Path) -> None:
    check(llmc("run", tiny_artifact, "--raw", "x" * 200), 7, "200 tokens", "96")


def test_bad_sampling_value(llmc: Llmc, tiny_artifact: Path) -> None:
    check(llmc("run", tiny_artifact, "hi", "--temperature=-1"), 7, "temperature")
    check(llmc("run", tiny_artifact, "hi", "--top-p", "1.5"), 7, "top_p")


def test_too_large_a_context(llmc: Llmc, tiny_artifact: Path) -> None:
    check(llmc("run", tiny_artifact, "hi", "--context", "4K"), 7, "96")


def test_system_message_without_a_template(llmc: Llmc, tiny_artifact: Path) -> None:
    check(llmc("run", tiny_artifact, "--raw", "--system", "be brief", "hi"), 2, "--system", "--raw")


def test_prompt_that_is_not_text(tiny_artifact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmc.cli.main", "run", str(tiny_artifact)],
        input=b"\xff\xfe\xfa",
        capture_output=True,
        check=False,
        timeout=60,
        env=dict(os.environ),
    )
    assert done.returncode == 2 and b"not UTF-8" in done.stderr
