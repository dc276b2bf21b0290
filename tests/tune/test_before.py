"""Kernels are timed behind the kernel that runs before them in the model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest

from llmc import targets
from llmc.manifest import KernelChoice
from llmc.schedules import records as R
from llmc.schedules.cpu import linear
from llmc.schedules.cuda import decode_attention, linear_hopper, norm_linear
from llmc.schedules.cuda.input_norm import normed
from llmc.schedules.protocol import KernelCall
from llmc.tune import inputs, pack
from llmc.tune.bench import LEAST, Before, Bench
from llmc.tune.task import Task, from_setup, tasks_of
from llmc.tune.worker import Worker

HOST, HOPPER = targets.parse("cpu"), targets.parse("cuda:sm_90a")
CALL, FIRST = linear._call(24, 32), linear._call(40, 72, bias=1)
TASK = Task(linear, CALL, HOST, 1, 0, ({"n": 3}, {"n": 5}), "second", before=(linear, FIRST))


class _Clock:
    """A device whose kernels take the time that they say."""

    rotated, name = 1, "a clock"

    def __init__(self) -> None:
        self.now, self.ran = 0.0, list[str]()

    def empty(self, shape: Any, dtype: str) -> tuple[Any, Any]:
        return shape, shape

    def upload(self, array: Any, dtype: str) -> Any:
        return array.shape

    def kernel(self, name: str, seconds: float, shapes: int) -> Callable[..., None]:
        """Takes ``seconds``, half of them behind any other kernel."""

        def run(*arguments: Any) -> None:
            assert len(arguments) == shapes
            self.now += seconds / 2 if self.ran and self.ran[-1] != name else seconds
            self.ran.append(name)

        return run

    def timer(self, kernel: Callable[..., None], sets: Any) -> Callable[[], float]:
        def measure() -> float:
            self.ran.clear()
            start = self.now
            for arguments in sets:
                kernel(*arguments)
            return (self.now - start) / len(sets)

        return measure


def bench(device: Any) -> tuple[Bench, list[dict[str, int]]]:
    first = TASK.preceding()
    assert first is not None
    assert (first.call, first.sizes) == (FIRST, ({"n": 3}, {"n": 5}))
    before = Before(device.kernel("first", 4.0, 4), FIRST, first.sizes, [inputs.make(FIRST, s) for s in first.sizes])
    sizes = list(TASK.sizes)
    arrays = [inputs.make(CALL, s) for s in sizes]
    return Bench(device, CALL, sizes, arrays, [arrays[0][0]] * 2, before), sizes


def test_a_call_takes_what_it_adds_to_the_kernel_before() -> None:
    device = _Clock()
    measured, sizes = bench(device)
    timers = measured.timers(device.kernel("second", 2.0, 3))
    assert [timer() for timer in timers] == [pytest.approx(1.0)] * len(sizes)
    assert device.ran == ["first"]  # alone, as what the pair is held against
    free = measured.timers(device.kernel("second", 0.0, 3))
    assert free[0]() == LEAST


def test_a_task_tells_other_processes_what_it_is_timed_behind() -> None:
    again = from_setup(json.loads(json.dumps(TASK.setup())))
    assert again.before is not None
    assert (again.before[0].NAME, again.before[1]) == (linear.NAME, FIRST)
    assert from_setup(dataclasses.replace(TASK, before=None).setup()).before is None
    fused = dataclasses.replace(TASK, family=linear_hopper, target=HOPPER, before=None, fused=(norm_linear, QKV))
    assert from_setup(json.loads(json.dumps(fused.setup()))).runs == (norm_linear, QKV)
    assert again.runs == (again.family, CALL)


def test_a_worker_times_candidates_behind_it() -> None:
    worker = Worker(TASK.setup())
    try:
        worker.build(TASK.default, "default")
        assert all(LEAST <= seconds < 1 for seconds in worker.time("default"))
    finally:
        worker.close()


def test_a_packed_task_brings_the_kernel_before_along(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    other = dataclasses.replace(TASK, sizes=({"n": 2},), before=None)
    assert pack.write(folder, HOST, [(TASK, [TASK.default]), (other, [TASK.default])], "test", lambda *_: None) == []
    first, second = json.loads((folder / "pack.json").read_text())["tasks"]
    assert second["before"] is None
    assert first["before"]["sizes"] == [{"n": 3}, {"n": 5}]
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), "--rounds", "2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert "2 of 2 tasks timed" in done.stdout, done.stderr[-2000:]
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [r["symbols"]["n"] for r in records] == [3, 5, 2]


QKV = normed(linear_hopper.linear_call.sample(6144, 4096, phase="decode"))
ATTEND = dataclasses.replace(decode_attention._call(32, 8, 128), phase="decode")
O = linear_hopper.linear_call.sample(4096, 4096, residual=1, phase="decode")  # noqa: E741
GATE_UP = normed(linear_hopper.linear_call.sample(28672, 4096, activation="silu_gated", phase="decode"))
DOWN = linear_hopper.linear_call.sample(4096, 14336, residual=1, phase="decode")
HEAD = linear_hopper.linear_call.sample(128256, 4096, phase="decode")
LAYERS = ((QKV, norm_linear), (ATTEND, decode_attention), (O, linear_hopper), (GATE_UP, norm_linear), (DOWN, linear_hopper))


def test_what_runs_before_a_kernel_follows_from_the_model() -> None:
    """The first kernel of a layer runs behind the last one of the layer before, and each range of rows behind its phase's."""

    def choice(call: KernelCall, family: Any, function: str, count: int) -> KernelChoice:
        call = call if call == ATTEND else dataclasses.replace(call, phase=function)
        return KernelChoice(function, call.op, "kernel", family.NAME, count, "", {}, "", "default", R.call_to_json(call))

    head = choice(HEAD, linear_hopper, "decode", 1)
    decode = [*(choice(call, family, "decode", 4) for call, family in LAYERS), head]
    extend = [choice(call, family, "extend", 4) for call, family in LAYERS if call != ATTEND]
    tasks = tasks_of([*decode, *extend], HOPPER)
    found = {(task.call.args[1].shape, task.part): task.before for task in tasks}
    shapes = {key: None if before is None else before[1].args[1].shape for key, before in found.items()}
    qkv, pages, o, gate_up, down, head_of = (call.args[1].shape for call in (QKV, ATTEND, O, GATE_UP, DOWN, HEAD))
    assert [shapes[key, "1-8"] for key in (qkv, o, gate_up, down, head_of)] == [down, pages, o, gate_up, down]
    assert shapes[pages, ""] == qkv
    assert shapes[o, "1025-"] == qkv
    assert {before[0].NAME for before in found.values() if before} == {linear_hopper.NAME, decode_attention.NAME}
    assert next(task for task in tasks if task.call.op == "llmc.attend").preceding().sizes[-1] == {"n": 64}  # type: ignore[union-attr]
    fused = {(task.call.args[1].shape, task.part): task.fused for task in tasks}
    assert [fused[key, "1-8"] for key in (qkv, gate_up)] == [(norm_linear, QKV), (norm_linear, GATE_UP)]
    assert not any((fused[o, "1-8"], fused[down, "1-8"], fused[pages, ""], fused[qkv, "129-256"]))
    preceding = {key: task.preceding() for task in tasks if (key := (task.call.args[1].shape, task.part))}
    assert {preceding[down, rows].part for rows in ("1-8", "1025-")} == {"1-8", "1025-"}  # type: ignore[union-attr]
    assert preceding[pages, ""].part == ""  # type: ignore[union-attr]  # its sizes are in several ranges of rows
    behind_attention = next(task for task in tasks if task.call.args[1].shape == o and task.part == "1-8").preceding()
    assert behind_attention is not None
    assert [(s["n"], s["b"], s["context"]) for s in behind_attention.sizes] == [(1, 1, inputs.SHORT), (8, 8, inputs.SHORT)]
