"""The plain layout and its CPU kernels, for every kind of scheme, against float64 products of the dequantized weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import layout_plain, quantized_linear_plain, quantized_take_plain
from tests.kernels.harness import build, error, run
from tests.quantize.weights import linear_arrays, random_matrix

TARGET = targets.parse("cpu")
LINEAR, TAKE = quantized_linear_plain.SHAPES, quantized_take_plain.SHAPES


@pytest.fixture(scope="module")
def module() -> Any:
    kernels = {label: (quantized_linear_plain, call) for label, call in LINEAR.items()}
    return build(kernels | {f"take_{label}": (quantized_take_plain, call) for label, call in TAKE.items()}, TARGET)


@pytest.mark.parametrize("label", LINEAR)
@pytest.mark.parametrize("n", [1, 5, 67])
def test_linear(module: Any, label: str, n: int) -> None:
    call = LINEAR[label]
    arrays = linear_arrays(call, layout_plain, n)
    result = run(module, label, call, arrays, {"n": n})
    assert quantized_linear_plain.matches(call, TARGET)
    assert error(result, quantized_linear_plain.reference(call, *arrays)) < 3e-6


@pytest.mark.parametrize("label", LINEAR)
def test_a_row_does_not_depend_on_its_batch(module: Any, label: str) -> None:
    call = LINEAR[label]
    arrays = linear_arrays(call, layout_plain, 7)
    together = run(module, label, call, arrays, {"n": 7})
    rows = [a[6:7] if i == 0 or (call.attr("residual") and i == len(arrays) - 1) else a for i, a in enumerate(arrays)]
    np.testing.assert_array_equal(run(module, label, call, rows, {"n": 1})[0], together[6])


@pytest.mark.parametrize("label", TAKE)
def test_take(module: Any, label: str) -> None:
    call = TAKE[label]
    o, k = call.attr("o"), call.attr("k")
    weight = random_matrix(call.attr("scheme"), o, k)
    ids = np.array([0, o - 1, 3, 3, o + 5, -1], np.int32)
    arrays = [ids, *layout_plain.pack(weight).values()]
    result = run(module, f"take_{label}", call, arrays, {"n": len(ids)})
    np.testing.assert_array_equal(result, weight.dequantize()[np.clip(ids, 0, o - 1)])


@pytest.mark.parametrize("name", ["int4", "int4p_g64", "int4z_g32", "fp8_e4m3_b128", "mxfp4", "nf4", "q5_1", "int8"])
def test_packing_is_exact(name: str) -> None:
    weight = random_matrix(name, 21, 70)
    parts = layout_plain.pack(weight)
    specs = layout_plain.parts(scheme(name), 21, 70)
    assert {n: (a.shape, str(a.dtype)) for n, a in parts.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}
    back = layout_plain.unpack(parts, scheme(name), 21, 70)
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())
    np.testing.assert_array_equal(back.codes, weight.codes)
