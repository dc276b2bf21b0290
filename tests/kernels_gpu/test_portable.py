"""Every portable kernel with the limits of every kind of GPU, on the CUDA emulator, against its float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.gpu import FAMILIES, append, attend_decode, attend_extend, gemm, gemv, moe, rope, topk
from llmc.schedules.gpu.norm import layer_norm, rms_norm
from llmc.schedules.protocol import KernelCall
from tests.kernels.harness import error, paged_arrays, random_arrays
from tests.kernels_cuda.emulated import TOLERANCE
from tests.kernels_cuda.emulated import call as emulate
from tests.support.cuda_emulator import run

TARGETS = ("rocm:gfx942", "rocm:gfx1100", "metal:apple7", "opencl:generic", "cuda:sm_80")
"""One of each kind of limits: waves of 64, waves of 32, vectors of 4, no exchange between lanes, and CUDA's own."""

LARGE = {"square_4096", "heads_32x8_128", "hidden_4096"}
"""Shapes for benchmarks: the emulator would take minutes."""


def cases(*families: Any) -> Any:
    chosen = [(f, label) for f in families for label in f.SHAPES if label not in LARGE]
    return pytest.mark.parametrize(("family", "label"), chosen, ids=[f"{f.NAME}-{label}" for f, label in chosen])


on_every_gpu = pytest.mark.parametrize("spec", TARGETS)


def relative_error(family: Any, call: KernelCall, spec: str, arrays: list[np.ndarray], symbols: dict[str, int]) -> float:
    """The error of the kernel in units of what its result's dtype allows."""
    result = emulate(family, call, targets.parse(spec), arrays, symbols)
    return error(result, family.reference(call, *arrays)) / TOLERANCE[call.result.dtype]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.NAME)
def test_a_family_takes_its_own_shapes_on_every_gpu_and_says_why(family: Any) -> None:
    for call in family.SHAPES.values():
        assert all(family.matches(call, targets.parse(spec)) for spec in TARGETS)
        assert family.matches(call, targets.parse("cpu:x86-64-v3")) is None
        moved, flops = family.roofline(call, n=3, b=3, m=2, num_pages=4, context=5)
        assert moved > 0 and flops >= 0


@on_every_gpu
@cases(gemv, gemm, rms_norm, layer_norm, rope)
def test_rows(family: Any, label: str, spec: str) -> None:
    call = family.SHAPES[label]
    symbols = {"n": 70 if family is gemm else 7}
    assert relative_error(family, call, spec, random_arrays(call, symbols, seed=7), symbols) < 1


@on_every_gpu
@cases(attend_decode)
def test_decode_attention(family: Any, label: str, spec: str) -> None:
    call = family.SHAPES[label]
    arrays, symbols = paged_arrays(call, [131, 1, 40], [1, 1, 1], seed=3)
    assert relative_error(family, call, spec, arrays, symbols) < 1


@on_every_gpu
@cases(attend_extend)
def test_extend_attention(family: Any, label: str, spec: str) -> None:
    """A chunk behind a prefix, a fresh prompt, a sequence without rows and a single row, in one step."""
    call = family.SHAPES[label]
    arrays, symbols = paged_arrays(call, [140, 5, 8, 9], [20, 5, 0, 1], seed=3)
    assert relative_error(family, call, spec, arrays, symbols) < 1


@on_every_gpu
@cases(moe)
def test_experts(family: Any, label: str, spec: str) -> None:
    call = family.SHAPES[label]
    arrays, rng = random_arrays(call, {"n": 3}, seed=3), np.random.default_rng(3)
    arrays[1] = np.stack([rng.permutation(call.args[3].shape[0])[: call.attr("top_k")] for _ in range(3)]).astype(np.int32)
    assert relative_error(family, call, spec, arrays, {"n": 3}) < 1


@on_every_gpu
@cases(append)
def test_append_writes_its_slots_and_nothing_else(family: Any, label: str, spec: str) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": 9, "num_pages": 6}, seed=9)
    arrays[2] = np.random.default_rng(9).permutation(6 * call.attr("page_size"))[:9].astype(np.int32)
    arrays[2][5] = -1
    result = run(family.build(call, targets.parse(spec), {}), targets.parse(spec), *arrays)[3]
    expected = family.reference(call, *arrays)
    np.testing.assert_array_equal(result.astype(np.float32), expected.astype(np.float32))
    assert (expected != arrays[3]).any()


@on_every_gpu
@cases(topk)
def test_topk(family: Any, label: str, spec: str) -> None:
    call = family.SHAPES[label]
    (x,) = random_arrays(call, {"n": 4}, seed=4)
    x[1] = np.round(x[1])  # ties
    x[2] = x[2, 0]
    x[3, ::2] = -np.inf
    start = np.full(call.result.bind({"n": 4}), -1, np.int32)
    result = run(family.build(call, targets.parse(spec), {}), targets.parse(spec), x, start)[-1]
    np.testing.assert_array_equal(result, family.reference(call, x))


@pytest.mark.parametrize("spec", ["rocm:gfx942", "opencl:generic"])
@cases(gemv, gemm, rms_norm, layer_norm)
def test_a_row_has_the_same_bits_in_every_batch(family: Any, label: str, spec: str) -> None:
    call, target = family.SHAPES[label], targets.parse(spec)
    arrays = random_arrays(call, {"n": 6}, seed=3)
    together = emulate(family, call, target, arrays, {"n": 6})
    alone = [a[4:5] if s.shape[0] == "n" else a for a, s in zip(arrays, call.args, strict=True)]
    one = emulate(family, call, target, alone, {"n": 1})
    assert one[0].tobytes() == together[4].tobytes()


@pytest.mark.parametrize("spec", ["rocm:gfx942", "opencl:generic"])
def test_attention_of_a_sequence_has_the_same_bits_in_every_batch(spec: str) -> None:
    call, target = attend_decode.SHAPES["group_3_64"], targets.parse(spec)
    arrays, symbols = paged_arrays(call, [70, 90, 20], [1, 1, 1], seed=7)
    together = emulate(attend_decode, call, target, arrays, symbols, {"split": 4})
    alone = [arrays[0][1:2], arrays[1], arrays[2][1:2], arrays[3][1:2], np.array([0, 1], np.int32)]
    one = emulate(attend_decode, call, target, alone, symbols | {"b": 1, "n": 1, "b+1": 2}, {"split": 4})
    assert one[0].tobytes() == together[1].tobytes()


@pytest.mark.parametrize(
    ("family", "label", "config"),
    [
        (gemv, "wide_9x1608_mixed", {"rows": 8, "unroll": 8, "block": 256}),
        (gemv, "odd_19x57", {"rows": 1, "unroll": 1, "block": 64}),
        (gemm, "extend_136x64_silu", {"tile": (128, 64, 8)}),
        (gemm, "extend_136x64_silu", {"tile": (128, 128, 8)}),
        (gemm, "extend_130x37", {"tile": (32, 64, 8)}),
    ],
)
def test_configurations(family: Any, label: str, config: dict[str, Any]) -> None:
    call, target = family.SHAPES[label], targets.parse("rocm:gfx942")
    arrays = random_arrays(call, {"n": 37}, seed=1)
    result = emulate(family, call, target, arrays, {"n": 37}, config)
    assert error(result, family.reference(call, *arrays)) < TOLERANCE[call.result.dtype]


@pytest.mark.parametrize("split", [1, 2, 32])
def test_splits_of_decode_attention(split: int) -> None:
    call = attend_decode.SHAPES["window_96_sinks"]
    arrays, symbols = paged_arrays(call, [131, 0, 40], [1, 1, 1], seed=5)
    result = emulate(attend_decode, call, targets.parse("rocm:gfx942"), arrays, symbols, {"split": split}).astype(np.float32)
    assert not result[1].any()  # a sequence without positions is padding of a batch
    arrays[3][1] = 1
    arrays[2][1] = 0
    expected = attend_decode.reference(call, *arrays)
    assert error(result[[0, 2]], expected[[0, 2]]) < TOLERANCE[call.result.dtype]


def test_padding_rows_of_a_step_stay_as_they_were() -> None:
    call, target = attend_extend.SHAPES["group_3_64"], targets.parse("rocm:gfx942")
    arrays, symbols = paged_arrays(call, [40, 3], [9, 3], seed=5)
    used = symbols["n"]
    arrays[0] = np.concatenate([arrays[0], arrays[0][:5]])
    result = emulate(attend_extend, call, target, arrays, {**symbols, "n": used + 5})
    assert error(result[:used], attend_extend.reference(call, *arrays)[:used]) < TOLERANCE[call.result.dtype]
    assert np.isnan(result[used:].astype(np.float32)).all()
