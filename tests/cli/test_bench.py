"""``llmc bench``: what is counted and how it is printed. The model is a stand-in with known speeds."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmc import bench, manifest, runtime
from llmc.errors import RequestError
from llmc.manifest import KernelChoice, Manifest, TensorInfo
from llmc.progress import SilentProgress
from llmc.runtime.results import Event

PROMPT_SECONDS, TOKEN_SECONDS = 0.05, 0.01


class Stub:
    """Takes PROMPT_SECONDS to the first token of any prompt and TOKEN_SECONDS for each one after it."""

    def generate(self, ids: list[int], *, max_tokens: int, ignore_eos: bool, stream: bool) -> Iterator[Event]:
        assert ignore_eos and stream
        for i in range(max_tokens):
            time.sleep(TOKEN_SECONDS if i else PROMPT_SECONDS)
            yield Event(0, 0, [1], "x")


@pytest.fixture
def results(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> bench.Results:
    info = manifest.read(artifact)
    monkeypatch.setattr(runtime, "load", lambda folder, **options: Stub())
    opened = SimpleNamespace(manifest=info, variant=info.variants[0])
    monkeypatch.setattr("llmc.runtime.artifact.open_artifact", lambda folder: opened)
    monkeypatch.setattr(bench, "read_bandwidth", lambda threads: 1e7)
    return bench.run(artifact, SilentProgress(), threads=1, prompts=[20], generations=[5], repeats=2)


def test_speeds_are_those_of_the_phase(results: bench.Results) -> None:
    prompt, generation = results.rows
    assert prompt.test == "pp20" and generation.test == "tg5"
    assert 0.5 * 20 / PROMPT_SECONDS < prompt.tokens_per_second <= 20 / PROMPT_SECONDS
    assert 0.5 / TOKEN_SECONDS < generation.tokens_per_second <= 1 / TOKEN_SECONDS
    assert prompt.gb_per_second is None
    # one [99, 64] float16 matrix, and half of 5 tokens of KV
    read = 99 * 64 * 2 + 3 * 2 * 8 * 2 * 2.5
    assert generation.gb_per_second == pytest.approx(read * generation.tokens_per_second / 1e9)
    assert generation.percent_of_limit == pytest.approx(100 * read * generation.tokens_per_second / 1e7)


def test_formats_agree(results: bench.Results) -> None:
    speed = results.rows[1].tokens_per_second
    from_json: dict[str, Any] = json.loads(bench.to_json(results))
    from_csv = list(csv.DictReader(io.StringIO(bench.to_csv(results))))
    markdown = bench.to_markdown(results).splitlines()
    assert from_json["rows"][1]["tokens_per_second"] == speed and from_json["read_bandwidth"] == 1e7
    assert float(from_csv[1]["tokens_per_second"]) == speed and from_csv[0]["gb_per_second"] == ""
    assert len({line.count("|") for line in markdown[:4]}) == 1
    assert "tg5" in markdown[3] and f"{speed:.2f} ±" in markdown[3]


def test_a_gpus_own_clock_shows_the_gap(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = manifest.read(artifact)
    model = Stub()
    # the device works half of the time that a token takes
    timer = SimpleNamespace(seconds=lambda: 6 * TOKEN_SECONDS / 2)
    model.executor = SimpleNamespace(bandwidth=lambda: 4e12, start_timer=lambda: timer)  # type: ignore[attr-defined]
    given: dict[str, Any] = {}
    monkeypatch.setattr(runtime, "load", lambda folder, **options: given.update(options) or model)
    opened = SimpleNamespace(manifest=info, variant=SimpleNamespace(kind="cuda", target="cuda:sm_90a"))
    monkeypatch.setattr("llmc.runtime.artifact.open_artifact", lambda folder: opened)
    results = bench.run(artifact, SilentProgress(), prompts=[], generations=[5], repeats=2)
    (row,) = results.rows
    assert given["threads"] is None and results.read_bandwidth == 4e12
    assert row.device_ms == pytest.approx(1e3 * TOKEN_SECONDS / 2)
    wall = PROMPT_SECONDS + 5 * TOKEN_SECONDS
    assert 100 * (1 - 3 * TOKEN_SECONDS / wall) <= row.gap_percent < 90
    cells = bench.to_markdown(results).splitlines()[2].split("|")
    assert cells[5].strip() == "" and cells[-3].strip() == "5.000" and cells[-2].strip().endswith("%")


def test_a_test_longer_than_the_context(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = manifest.read(artifact)
    opened = SimpleNamespace(manifest=info, variant=info.variants[0])
    monkeypatch.setattr("llmc.runtime.artifact.open_artifact", lambda folder: opened)
    with pytest.raises(RequestError, match="context of 4096"):
        bench.run(artifact, SilentProgress(), prompts=[5000], generations=[])


def _with(info: Manifest, tensors: dict[str, list[int]]) -> Manifest:
    info.tensors = {name: TensorInfo("f", "float32", shape, "float32", "float32") for name, shape in tensors.items()}
    info.variants[0].weights = list(tensors)
    return info


def test_an_embedding_of_its_own_is_not_read(artifact: Path) -> None:
    info = manifest.read(artifact)
    tied = bench.bytes_per_token(_with(info, {"embed": [99, 64], "up": [50, 64]}), 0)
    untied = bench.bytes_per_token(_with(info, {"embed": [99, 64], "up": [50, 64], "head": [99, 64]}), 0)
    assert tied == untied == (99 + 50) * 64 * 4


def test_experts_leave_the_bytes_open(artifact: Path) -> None:
    info = manifest.read(artifact)
    info.variants[0].kernels.append(KernelChoice("decode", "llmc.moe", "moe", "cpu.moe", 1, "", {}, ""))
    assert bench.bytes_per_token(info, 128) is None


def test_read_bandwidth_is_plausible() -> None:
    """Slower than caches, faster than a disk."""
    assert 1e9 < bench.read_bandwidth(1) < 2e12
