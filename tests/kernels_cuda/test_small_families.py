"""Norms, rope, append, topk and experts on CUDA: every shape against its float64 reference, through the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.cuda import append, moe, rope, topk
from llmc.schedules.cuda.norm import layer_norm, rms_norm
from tests.kernels.harness import DTYPES, error, random_arrays
from tests.support.cuda_emulator import run, source

TARGET = targets.parse("cuda:sm_80")
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


def cases(*families: Any) -> Any:
    chosen = [(f, label) for f in families for label in f.SHAPES]
    return pytest.mark.parametrize(("family", "label"), chosen, ids=[f"{f.NAME}-{label}" for f, label in chosen])


def compute(family: Any, label: str, arrays: list[np.ndarray], symbols: dict[str, int]) -> np.ndarray:
    """The kernel's result; its buffer starts as NaN, so that nothing unwritten goes unnoticed."""
    call = family.SHAPES[label]
    dtype = DTYPES[call.result.dtype]
    start = np.full(call.result.bind(symbols), np.nan if dtype != np.int32 else -1).astype(dtype)
    return run(family.build(call, TARGET, {}), TARGET, *arrays, start)[-1]


@cases(rms_norm, layer_norm, rope, append, topk, moe)
def test_a_family_takes_its_own_shapes_and_says_why(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    assert family.matches(call, TARGET)
    assert family.matches(call, targets.parse("cpu:x86-64-v3")) is None
    moved, flops = family.roofline(call, n=3, b=3, m=2, num_pages=4)
    assert moved > 0 and flops >= 0


@cases(rms_norm, layer_norm, rope)
@pytest.mark.parametrize("n", [1, 7])
def test_rows(family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": n}, seed=n)
    result = compute(family, label, arrays, {"n": n})
    assert error(result, family.reference(call, *arrays)) < TOLERANCE[call.result.dtype]


@cases(rms_norm, layer_norm, rope)
def test_a_row_has_the_same_bits_in_every_batch(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": 5}, seed=3)
    rows = [i for i, spec in enumerate(call.args) if spec.shape[0] == "n"]
    together = compute(family, label, arrays, {"n": 5})
    alone = [a[4:5] if i in rows else a for i, a in enumerate(arrays)]
    np.testing.assert_array_equal(compute(family, label, alone, {"n": 1})[0], together[4])


@cases(append)
def test_append_writes_its_slots_and_nothing_else(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": 9, "num_pages": 6}, seed=9)
    arrays[2] = np.random.default_rng(9).permutation(6 * call.attr("page_size"))[:9].astype(np.int32)
    arrays[2][5] = -1
    result = run(family.build(call, TARGET, {}), TARGET, *arrays)[3]
    expected = family.reference(call, *arrays)
    np.testing.assert_array_equal(result.astype(np.float32), expected.astype(np.float32))
    assert (expected != arrays[3]).any()


@cases(topk)
def test_topk(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    (x,) = random_arrays(call, {"n": 4}, seed=4)
    x[1] = np.round(x[1])  # ties
    x[2] = x[2, 0]
    x[3, ::2] = -np.inf
    np.testing.assert_array_equal(compute(family, label, [x], {"n": 4}), family.reference(call, x))


@cases(moe)
@pytest.mark.parametrize("n", [1, 3])
def test_moe(family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": n}, seed=n)
    rng = np.random.default_rng(n)
    experts = call.args[3].shape[0]
    arrays[1] = np.stack([rng.permutation(experts)[: call.attr("top_k")] for _ in range(n)]).astype(np.int32)
    result = compute(family, label, arrays, {"n": n})
    assert error(result, family.reference(call, *arrays)) < TOLERANCE[call.result.dtype]


def test_rows_are_read_and_written_in_16_bytes() -> None:
    text = source(rms_norm.build(rms_norm.SHAPES["hidden_4096"], TARGET, {}), TARGET)
    assert text.count("*(uint4*)") >= 4
