"""``llmc tune --whole``: choices for the whole model are tried, kept if they win, recorded, and taken by later compiles."""

from __future__ import annotations

import json
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
from llmc.progress import SilentProgress
from llmc.schedules import records as R
from llmc.schedules.cuda import gemv
from llmc.settings import settings_from, settings_of, with_choices
from llmc.targets import dependent_launch
from llmc.targets.cuda import tvm_target
from llmc.tune import whole
from tests.support.tiny_models import build

HOST = targets.parse("cpu")
CALL = family.model_call(64, 256, 2, "float32")
REST = {"norm": True, "early": True, "chunks": 6}


def time_of(choices: dict[str, Any]) -> whole.Times:
    """Best: pages of 32, gated layers not fused."""
    step = 1e-3 * (1 + (choices["page_size"] != 32) * 0.1 + choices["gated"] * 0.2 + (not choices["append"]) * 0.05)
    return step + (not choices["step"]) * 1e-3 + (choices["chunks"] != 6) * 1e-4, 0.1


class _Machine:
    """Compiles a configuration to a file that holds it, and times it as :func:`time_of` says."""

    def __init__(self, broken: dict[str, Any] | None = None) -> None:
        self.broken, self.runs = broken, 0

    def build(self, choices: dict[str, Any], folder: Path) -> None:
        folder.mkdir()
        (folder / "choices.json").write_text(json.dumps(choices))

    def run(self, folder: Path) -> whole.Times:
        self.runs += 1
        choices = json.loads((folder / "choices.json").read_text())
        if choices == self.broken:
            raise whole.RunFailed("it crashed")
        return time_of(choices)


def search(tmp_path: Path, machine: _Machine, known: R.Records) -> whole.Outcome:
    out = tmp_path / "r.jsonl"
    return whole.Search(CALL, HOST, machine.build, out, known, "a machine", machine.run).search(SilentProgress())


def test_each_axis_is_tried_from_the_best_so_far_and_records_give_the_winner(tmp_path: Path) -> None:
    found = search(tmp_path, _Machine(), R.Records())
    assert found.best == {"page_size": 32, "gated": False, "append": True, "step": True, **REST}
    assert len(found.times) == 1 + 2 + 1 + 1 + 1 + 2
    records = R.load([tmp_path])
    assert records.notes == []
    chosen, origin = family.find(records, CALL, HOST)
    assert chosen == family.Choices(page_size=32, gated=False)
    assert origin == "record: measured on a machine, 8 configurations tried"
    assert chosen.unfused == {"gated"}
    assert family.find(records, family.model_call(64, 256, 2, "int4_g32"), HOST)[0] == family.DEFAULT
    assert "<- best" in found.table()


def test_a_choice_that_fails_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    broken = {"page_size": 32, "gated": True, "append": True, "step": True, **REST}
    found = search(tmp_path, _Machine(broken), R.Records())
    assert found.best == {"page_size": 16, "gated": False, "append": True, "step": True, **REST}
    assert found.failed == {R.config_text(broken): "it crashed"}
    failed = [r for r in R.load([tmp_path]).entries.values() if r.seconds is None]
    assert {r.error for r in failed} == {"it crashed"}


def test_a_model_that_does_not_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="with llmc's defaults it does not run: it crashed"):
        search(tmp_path, _Machine({"page_size": 16, "gated": True, "append": True, "step": True, **REST}), R.Records())


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
    assert with_choices(settings, source, chosen, R.Records(), None, None).unfused == {"norm"}
    assert with_choices(settings, source, chosen[1:], R.Records(), None, None).unfused == family.DEFAULT.unfused


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
    assert main(["tune", "m", "--whole", "--offline", "x"]) == 2
    assert "--whole runs the model here" in capsys.readouterr().err
