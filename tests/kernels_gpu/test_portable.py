"""Every portable kernel with the limits of every kind of GPU, on the CUDA emulator, against its float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.gpu import (
    FAMILIES,
    append,
    attend_decode,
    attend_extend,
    gemm,
    gemm_matrix,
    gemv,
    quantized_gemm,
    quantized_gemm_matrix,
    quantized_gemv,
    quantized_take,
    rope_append,
    topk,
)
from llmc.schedules.gpu.norm import layer_norm, rms_norm
from tests.kernels.harness import error, paged_arrays, random_arrays
from tests.kernels_cuda.emulated import TOLERANCE, kernel
from tests.kernels_cuda.emulated import call as emulate
from tests.kernels_gpu.cases import arguments, errors, operands, rows_of
from tests.support.cuda_emulator import run, source

TARGETS = ("rocm:gfx942", "rocm:gfx1100", "metal:apple7", "opencl:generic", "cuda:sm_80")
"""One of each kind of limits: waves of 64, waves of 32, vectors of 4, no exchange between lanes, and CUDA's own."""

CODE_TARGETS = ("rocm:gfx942", "opencl:generic")

LARGE = {"square_4096", "heads_32x8_128", "hidden_4096", "square_4096_int4_g128", "embedding_128256x4096_int4_g128"}
"""Shapes for benchmarks: the emulator would take minutes."""


def cases(*families: Any) -> Any:
    chosen = [(f, label) for f in families for label in f.SHAPES if label not in LARGE]
    return pytest.mark.parametrize(("family", "label"), chosen, ids=[f"{f.NAME}-{label}" for f, label in chosen])


PRODUCTS = (gemm_matrix, quantized_gemm_matrix, quantized_gemv, quantized_gemm, quantized_take)
"""Families that are slow to emulate: in the default run each shape meets one target, in turn, so that all of them are met."""

INSTRUCTIONS = ("cuda:sm_80", "rocm:gfx942", "rocm:gfx1100", "rocm:gfx1201", "metal:apple7")
"""One target for each matrix instruction."""


def pairs(*, every: bool) -> Any:
    """(family, label, target) of :data:`PRODUCTS`: for every target that takes a shape, or for one."""
    chosen: list[tuple[Any, str, str]] = []
    for family in PRODUCTS:
        order = INSTRUCTIONS if "matrix" in family.NAME else TARGETS
        labels = [label for label in family.SHAPES if label not in LARGE]
        for i, label in enumerate(labels):
            chosen += [(family, label, spec) for spec in (order if every else order[i % len(order) :][:1])]
    return pytest.mark.parametrize(
        ("family", "label", "spec"), chosen, ids=[f"{f.NAME}-{label}-{spec}" for f, label, spec in chosen]
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.NAME)
def test_a_family_takes_its_own_shapes_on_every_gpu_and_says_why(family: Any) -> None:
    for call in family.SHAPES.values():
        gpus = INSTRUCTIONS if "matrix" in family.NAME else TARGETS
        assert all(family.matches(call, targets.parse(spec)) for spec in gpus)
        assert family.matches(call, targets.parse("cpu:x86-64-v3")) is None
        moved, flops = family.roofline(call, n=3, b=3, m=2, num_pages=4, context=5)
        assert moved > 0 and flops >= 0


def kernel_cases() -> list[Any]:
    """Everything with every kind of limits; pages of codes with the two that differ most. In the default run each shape meets one
    kind, in turn: two in families of so few shapes that they would not meet all kinds otherwise."""
    found = []
    for f in FAMILIES:
        labels = [label for label in f.SHAPES if label not in LARGE] if f is not topk and f not in PRODUCTS else []
        for i, label in enumerate(labels):
            specs = CODE_TARGETS if f.SHAPES[label].attr("kv_scheme") else TARGETS
            now = {specs[i % len(specs)]}
            if len(labels) < len(TARGETS):
                now.add(specs[(i + len(specs) // 2) % len(specs)])
            found += [pytest.param(f, label, spec, marks=() if spec in now else pytest.mark.slow) for spec in specs]
    return found


@pytest.mark.parametrize(("family", "label", "spec"), kernel_cases(), ids=lambda v: getattr(v, "NAME", v))
def test_kernel(family: Any, label: str, spec: str) -> None:
    check(family, label, spec)


@pairs(every=False)
def test_product(family: Any, label: str, spec: str) -> None:
    check(family, label, spec)


@pytest.mark.slow
@pairs(every=True)
def test_product_on_every_gpu(family: Any, label: str, spec: str) -> None:
    check(family, label, spec)


def check(family: Any, label: str, spec: str) -> None:
    """Compare a kernel of default configuration with its reference."""
    call, target = family.SHAPES[label], targets.parse(spec)
    arrays, symbols = operands(family, call, rows_of(family, call))
    after = kernel(family, call, target)(*arguments(family, call, arrays, symbols))
    for dtype, found in errors(family, call, arrays, after).items():
        assert found <= (0 if family is append and dtype != "uint8" else TOLERANCE[dtype])


def topk_cases() -> list[Any]:
    """g++ takes over a minute for 37 rounds of a block's maximum without lanes that exchange values."""
    costly = {("all_of_37", "opencl:generic")}
    pairs = [(label, spec) for spec in TARGETS for label in topk.SHAPES]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair in costly)) for pair in pairs]


@pytest.mark.parametrize(("label", "spec"), topk_cases())
def test_topk(label: str, spec: str) -> None:
    call = topk.SHAPES[label]
    (x,) = random_arrays(call, {"n": 4}, seed=4)
    x[1] = np.round(x[1])  # ties
    x[2] = x[2, 0]
    x[3, ::2] = -np.inf
    start = np.full(call.result.bind({"n": 4}), -1, np.int32)
    result = run(topk.build(call, targets.parse(spec), {}), targets.parse(spec), x, start)[-1]
    np.testing.assert_array_equal(result, topk.reference(call, x))


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
@cases(rope_append)
def test_a_row_of_rope_append_has_the_same_bits_in_every_batch(label: str, family: Any, spec: str) -> None:
    call, target = family.SHAPES[label], targets.parse(spec)
    arrays, symbols = operands(family, call, 5)
    launch, rows = kernel(family, call, target), [i for i, s in enumerate(call.args) if s.shape[0] == "n"]
    together = launch(*arguments(family, call, arrays, symbols))[-1]
    alone = [a[4:5] if i in rows else a for i, a in enumerate(arrays)]
    one = launch(*arguments(family, call, alone, symbols | {"n": 1}))[-1]
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


def test_rows_are_read_and_written_in_16_bytes() -> None:
    target = targets.parse("cuda:sm_80")
    text = source(rms_norm.build(rms_norm.SHAPES["hidden_4096"], target, {}), target)
    assert text.count("*(uint4*)") >= 4


def test_no_number_stays_none_in_bfloat16() -> None:
    """A sum with a NaN whose bits are all ones, as NVIDIA's cores make it."""
    call, target = rms_norm.SHAPES["heads_128"], targets.parse("rocm:gfx942")
    x, weight = random_arrays(call, {"n": 2}, seed=1)
    x.view(np.uint16)[0, 0, 3] = 0xFFFF
    result = emulate(rms_norm, call, target, [x, weight], {"n": 2}).astype(np.float32)
    assert np.isnan(result[0, 0]).all() and np.isfinite(result[1]).all()
