"""``llmc tune --only whole``: choices for the whole model are tried, kept if they win, recorded, and taken by later compiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

import llmc
from llmc import targets
from llmc.cli.main import main
from llmc.errors import LlmcError
from llmc.importer.resolve import resolve
from llmc.manifest import read
from llmc.passes import choices as family
from llmc.passes.legalize import PrimFuncs
from llmc.passes.lower_kernels import KernelLibrary
from llmc.schedules import lookup as L
from llmc.schedules import records as R
from llmc.schedules.cuda import gemv
from llmc.settings import settings_from, settings_of, with_choices
from llmc.targets import dependent_launch
from llmc.targets.cuda import tvm_target
from llmc.tune import whole
from llmc.tune.compare import Site
from llmc.tune.turns import RunFailed, Workload
from tests.support.tiny_models import build

HOST = targets.parse("cpu")
CALL = family.model_call(64, 256, 2, "float32")
REST = {"attend": True, "norm": True, "early": True, "chunks": 6}


def time_of(choices: dict[str, Any], workload: Workload) -> float:
    """Best: pages of 32, gated layers not fused."""
    if workload.kind == "prefill":
        return 0.1
    step = 1e-3 * (1 + (choices["page_size"] != 32) * 0.1 + choices["gated"] * 0.2 + (not choices["append"]) * 0.05)
    return step + (not choices["step"]) * 1e-3 + (choices["chunks"] != 6) * 1e-4


class _Machine:
    """Compiles a configuration to a file that holds it, and times it as :func:`time_of` says."""

    def __init__(self, broken: dict[str, Any] | None = None) -> None:
        self.broken, self.builds = broken, 0

    def build(self, choices: family.Choices, folder: Path) -> None:
        self.builds += 1
        folder.mkdir(parents=True)
        (folder / "choices.json").write_text(json.dumps(dataclasses.asdict(choices)))

    def open(self, base: Path, rival: Path, tests: Sequence[Workload]) -> None:
        self.pair = [json.loads((folder / "choices.json").read_text()) for folder in (base, rival)]
        if self.broken in self.pair:
            raise RunFailed("it crashed")

    def pairs(self, test: Workload, rounds: int) -> list[tuple[float, float]]:
        return [(time_of(self.pair[0], test), time_of(self.pair[1], test))] * rounds

    def close(self) -> None:
        pass


def search(tmp_path: Path, machine: _Machine, known: L.Records) -> whole.Outcome:
    site = Site("a model", machine, known, tmp_path / "r.jsonl", tmp_path / f"models{machine.builds}", "a machine", "test")
    return whole.Search(site, CALL, HOST, machine.build).run()


def test_each_axis_is_tried_from_the_best_so_far_and_records_give_the_winner(tmp_path: Path) -> None:
    machine = _Machine()
    found = search(tmp_path, machine, L.Records())
    assert found.best == {"page_size": 32, "gated": False, "append": True, "step": True, **REST}
    assert len(found.tried) == 2 + 1 + 1 + 1 + 2
    records = L.load([tmp_path])
    assert records.notes == []
    chosen, origin = family.find(records, CALL, HOST)
    assert chosen == family.Choices(page_size=32, gated=False)
    assert origin.startswith("record: a model gained by it on a machine")
    assert chosen.unfused == {"gated"}
    assert family.find(records, family.model_call(64, 256, 2, "int4_g32"), HOST)[0] == family.DEFAULT
    assert [line.rpartition(": ")[2] for line in found.lines()].count("kept") == 2
    again = search(tmp_path, machine, records)
    assert again.best == found.best
    assert len(again.tried) < len(found.tried)  # only what was not tried from there


def test_a_choice_that_fails_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    broken = {"page_size": 32, "gated": True, "append": True, "step": True, **REST}
    found = search(tmp_path, _Machine(broken), L.Records())
    assert found.best == {"page_size": 16, "gated": False, "append": True, "step": True, **REST}
    assert [text for text, c in found.tried.items() if c.failed == "it crashed"] == [R.config_text(broken)]
    failed = [r for r in L.load([tmp_path]).entries.values() if r.seconds is None]
    assert {r.error for r in failed} == {"it crashed"}


def test_a_model_that_does_not_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="as it is compiled now it does not run: it crashed"):
        search(tmp_path, _Machine({"page_size": 16, "gated": True, "append": True, "step": True, **REST}), L.Records())


def test_nothing_fused_computes_the_same_and_the_manifest_says_so(tmp_path: Path) -> None:
    folder, logits, kernels = tmp_path / "model", [], []
    build("llama", folder, dtype="float32")
    for name, chosen in (
        ("plain", family.Choices(page_size=32, gated=False, append=False, norm=False, step=False)),
        ("fused", family.Choices(chunks=2)),
    ):
        llmc.compile(str(folder), out=tmp_path / name, dtype="float32", choices=chosen, max_batch=2)
        with llmc.load(tmp_path / name) as model:
            found = model.generate([3, 1, 4, 1, 5], max_tokens=6, ignore_eos=True, logprobs=2)
            logits.append([t.logprob for t in found.logprobs])
        info = read(tmp_path / name)
        assert info.kv.page_size == chosen.page_size
        assert info.options.get("unfused", sorted(family.DEFAULT.unfused)) == sorted(chosen.unfused)
        assert settings_from(info).chunks == chosen.chunks
        kernels.append(sum(k.count for k in info.variants[0].kernels if k.function == "decode"))
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)
    assert kernels[0] > kernels[1]


def test_several_targets_share_weights_that_no_norm_is_folded_into(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", dtype="float32")
    source = resolve(str(tmp_path / "model"))
    settings = settings_of(source, "float32", None, None, (), 32, 2)
    chosen = [HOST, targets.parse("cuda:sm_90a")]
    assert with_choices(settings, source, chosen, L.Records(), None, None).unfused == {"norm"}
    assert with_choices(settings, source, chosen[1:], L.Records(), None, None).unfused == family.DEFAULT.unfused


def test_kernels_that_wait_for_the_one_before() -> None:
    """On NVIDIA GPUs starting early is a choice, of kernels in PTX by their configuration, of all others by an attribute."""
    hopper, call = targets.parse("cuda:sm_90a"), gemv.SHAPES["even_64x256"]
    assert family.space(CALL, hopper)["early"] == [True, False]
    for early in (True, False):
        library = KernelLibrary(hopper, (gemv,), PrimFuncs(), early=early)
        library.kernel("decode", call)
        assert library.choices()[0].config["dependent_launch"] is early

    @T.prim_func(s_tir=True)
    def plain(a: T.Buffer((4,), "float32")) -> None:
        a[0] = T.float32(1)

    module = tvm.IRModule({"plain": plain})
    for now, early in ((module, True), (dependent_launch.forbid(module), False)):
        asked = dependent_launch.request(now, tvm_target(hopper))
        assert (dependent_launch.LAUNCH_PARAMETERS in asked["plain"].attrs) is early


def test_whole_is_not_for_other_machines_or_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "m", "--only", "whole", "--offline", "x"]) == 2
    assert "--only whole runs the model here" in capsys.readouterr().err
