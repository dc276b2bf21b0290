"""Norms, rope, append, topk and experts on CUDA: every shape against its float64 reference, through the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.cuda import append, moe, rope, rope_append, topk
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


@cases(rms_norm, layer_norm, rope, append, rope_append, topk, moe)
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


@cases(rope_append)
@pytest.mark.parametrize("n", [1, 9])
def test_rope_append_returns_the_queries_and_writes_the_slots(family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    symbols = {"n": n, "num_pages": 6}
    arrays = random_arrays(call, symbols, seed=n)
    arrays[3] = np.random.default_rng(9).permutation(6 * call.attr("page_size"))[:n].astype(np.int32)
    if n > 1:
        arrays[3][5] = -1
    start = np.full(call.result.bind(symbols), np.nan, DTYPES[call.result.dtype])
    found = run(family.build(call, TARGET, {}), TARGET, *arrays, start)
    queries, pages = family.reference(call, *arrays)
    assert error(found[-1], queries) < TOLERANCE[call.result.dtype]
    assert error(found[4], pages.astype(np.float64)) < TOLERANCE[call.args[4].dtype]
    untouched = pages == arrays[4]
    np.testing.assert_array_equal(found[4][untouched], arrays[4][untouched])
    assert not untouched.all()


@cases(rope_append)
def test_a_row_of_rope_append_has_the_same_bits_in_every_batch(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": 5, "num_pages": 3}, seed=3)
    arrays[3] = np.arange(5, dtype=np.int32)
    rows = [i for i, spec in enumerate(call.args) if spec.shape[0] == "n"]
    kernel, dtype = family.build(call, TARGET, {}), DTYPES[call.result.dtype]
    together = run(kernel, TARGET, *arrays, np.zeros(call.result.bind({"n": 5}), dtype))[-1]
    alone = [a[4:5] if i in rows else a for i, a in enumerate(arrays)]
    np.testing.assert_array_equal(run(kernel, TARGET, *alone, np.zeros(call.result.bind({"n": 1}), dtype))[-1][0], together[4])


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
