"""One parallel region per step: the same bits as kernel by kernel, on any number of threads, however they are delayed."""

from __future__ import annotations

import threading
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm

from llmc.passes import pipeline
from llmc.passes.memory import kernel_calls
from llmc.passes.pipeline import lower
from llmc.passes.team_kernels import team_kernel
from llmc.schedules.cpu import attend, linear, quantized_linear, rms_norm, team
from llmc.schedules.protocol import KernelCall
from llmc.targets import cpu, parse
from llmc.targets.cpu_pipeline import PIPELINE
from llmc.tune.build import compile_one
from tests.kernels.harness import build, paged_arrays, run, tensor
from tests.passes.test_end_to_end import OPTIONS, TARGET, Machine
from tests.support import graphs
from tests.support.stepper import Stepper, mixed_schedule


def logits_of(case: str) -> tuple[list[dict[int, np.ndarray]], Any]:
    built = graphs.build(graphs.CASES[case])
    lowered = lower(built.module, built.table, TARGET, OPTIONS)
    sequences = [np.random.default_rng(5).integers(0, graphs.CASES[case].vocab, n) for n in (11, 7, 5)]
    stepper = Stepper(Machine(built, lowered, "float32"), sequences, OPTIONS.page_size, 12)
    mixed_schedule(stepper)
    return stepper.logits, lowered


# Slow: what other norms, windows and layouts of weights add is kernels of the same kinds; compare() in test_end_to_end.py has all
# of them by default, in one region.
@pytest.mark.parametrize("case", ["grouped", *(pytest.param(case, marks=pytest.mark.slow) for case in ("nhd", "offset_norms"))])
def test_a_step_in_one_region_gives_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, lowered = logits_of(case)
    for phase in pipeline.PHASES:
        assert [k for k in kernel_calls(lowered.mod[phase]) if not k.startswith("shape_func")] == [f"step_{phase}"]
    monkeypatch.setattr(pipeline, "PASSES", [p for p in pipeline.PASSES if p[0] != "one_region"])
    apart, _ = logits_of(case)
    for one, other in zip(together, apart, strict=True):
        for position, logits in one.items():
            np.testing.assert_array_equal(logits, other[position])


def default_config(family: Any, call: KernelCall) -> dict[str, Any]:
    return {axis: values[0] for axis, values in family.space(call, TARGET).items()}


def family_kernel(family: Any, call: KernelCall) -> Any:
    return family.build(call, TARGET, default_config(family, call))


def test_kernels_for_one_thread_and_for_a_team_are_told_apart() -> None:
    parallel = team_kernel("a", family_kernel(linear, linear.SHAPES["square_576"]), True, 6)
    assert parallel.phases == 1 and not parallel.shared
    rounded = team_kernel("b", family_kernel(quantized_linear, quantized_linear.SHAPES["qkv_960x576_q4_1"]), True, 6)
    assert rounded.phases == 3 and len(rounded.shared) == 3  # rows rounded by all threads or by one, then the panels
    # Segments of each row, then what they found of each row.
    split = team_kernel("c", family_kernel(attend, attend.SHAPES["smollm2_decode"]), True, 6)
    assert split.phases == 2 and len(split.shared) == 1
    norm = family_kernel(rms_norm, rms_norm.SHAPES["smollm2"])
    assert team_kernel("d", norm, True, 6).phases is None
    assert team_kernel("e", norm, False, 6).phases == 2  # with many rows on all threads, else on one


@pytest.mark.parametrize("lengths", [[1030], [40, 257, 800], [300] * (attend.TASKS // 3 + 1)])
def test_a_team_splits_attention_as_threads_of_one_kernel_do(lengths: list[int]) -> None:
    call = attend.SHAPES["smollm2_decode"]
    arrays, symbols = paged_arrays(call, lengths, [1] * len(lengths), seed=2)
    alone = run(build({"alone": (attend, call)}, TARGET), "alone", call, arrays, symbols)
    of_team = compile_one(attend, call, TARGET, default_config(attend, call), [symbols]).kernel
    out = tensor(np.full(alone.shape, np.nan, np.float32))
    for _ in range(5):
        of_team(*map(tensor, arrays), out)
        np.testing.assert_array_equal(out.numpy(), alone)


def test_machines_without_the_means_keep_their_kernels_apart() -> None:
    assert team.has_team(parse("cpu:x86-64")) and team.has_team(parse("cpu:aarch64+neon"))
    assert not team.has_team(parse("cuda:sm_80"))


@pytest.mark.parametrize("threads", [1, 2, 3, 11])
def test_every_iteration_runs_once_and_phases_follow_each_other(threads: int) -> None:
    """Threads of ours, not the pool's, call a function of two phases, some late; the second reads what the first wrote."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    rows = 1000
    builder = IRBuilder()
    with builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.is_scheduled": True})
        first = T.match_buffer(T.arg("first", T.handle()), (rows,), "int32")
        second = T.match_buffer(T.arg("second", T.handle()), (rows,), "int32")
        slots = T.match_buffer(T.arg("slots", T.handle()), (3 * team.SLOT // 4,), "int32")
        rank = T.arg("rank", T.int32())

        def one(low: Any, high: Any) -> None:
            with T.serial(low, high) as i:
                T.buffer_store(first, first[i] + i, [i])

        def two(low: Any, high: Any) -> None:
            with T.serial(low, high) as i:
                T.buffer_store(second, second[i] + first[rows - 1 - i], [i])

        with T.attr(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(team.intrinsics(TARGET))):
            of, extent = team.Team(tirx.const(threads, "int32"), rank), tirx.const(rows, "int32")
            team.share(of.slot(slots.data, 0), extent, of, 6, one)
            team.once(of.slot(slots.data, 1), lambda: T.buffer_store(first, first[0] + 7, [0]))
            team.share(of.slot(slots.data, 2), extent, of, 6, two)
    run = tvm.tirx.build(tvm.IRModule({"main": builder.get()}), target=cpu.tvm_target(TARGET), pipeline=PIPELINE)["main"]
    for _ in range(20):
        arrays = [tvm.runtime.tensor(np.zeros(n, np.int32)) for n in (rows, rows, 3 * team.SLOT // 4)]
        workers = [threading.Thread(target=run, args=(*arrays, rank)) for rank in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        expected = np.arange(rows)
        expected[0] += 7
        np.testing.assert_array_equal(arrays[0].numpy(), expected)
        np.testing.assert_array_equal(arrays[1].numpy(), expected[::-1])
