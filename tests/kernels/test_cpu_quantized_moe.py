"""Quantized experts on a CPU against the dequantized ones, and row by row."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme
from llmc.schedules.cpu import quantized_moe
from llmc.schedules.protocol import KernelCall
from tests.kernels.harness import Kernels, error, run
from tests.kernels.quantized_cases import expert_operands
from tests.kernels.test_cpu_quantized import quantized
from tests.quantize.weights import random_matrix

EXACT = ("clipped_gate_64x40_mxfp4",)
"""Cases whose activations stay floats in both products."""


@cache
def module() -> Any:
    return Kernels({label: (quantized_moe, call) for label, call in quantized_moe.SHAPES.items()}, targets.parse("cpu"))


def arrays_of(call: KernelCall, n: int) -> list[np.ndarray]:
    return expert_operands(call, n, n, quantized_moe.LAYOUTS, matrices)


def matrices(how: Scheme, o: int, k: int, rng: np.random.Generator) -> QuantizedTensor:
    return (quantized if how.super_group else random_matrix)(how.name, o, k, int(rng.integers(1000)))


@pytest.mark.parametrize("label", quantized_moe.SHAPES)
@pytest.mark.parametrize("n", [1, 19])
def test_results_are_those_of_the_dequantized_experts(label: str, n: int) -> None:
    call = quantized_moe.SHAPES[label]
    assert quantized_moe.matches(call, targets.parse("cpu"))
    arrays = arrays_of(call, n)
    result = run(module(), label, call, arrays, {"n": n})
    assert error(result, quantized_moe.reference(call, *arrays)) < (2e-6 if label in EXACT else 2e-2)


@pytest.mark.parametrize("label", quantized_moe.SHAPES)
def test_a_row_has_the_same_bits_in_every_batch(label: str) -> None:
    call = quantized_moe.SHAPES[label]
    arrays = arrays_of(call, 17)
    together = run(module(), label, call, arrays, {"n": 17})
    for r in (0, 9, 16):
        alone = [a[r : r + 1] if i < 3 else a for i, a in enumerate(arrays)]
        np.testing.assert_array_equal(run(module(), label, call, alone, {"n": 1})[0], together[r])


def test_experts_that_no_row_is_routed_to_are_not_read() -> None:
    label = "int4_two_of_eight_64x96"
    call = quantized_moe.SHAPES[label]
    arrays = arrays_of(call, 3)
    for panels in arrays[3:5]:
        panels[[e for e in range(8) if e not in arrays[1]]] = 0xFF  # scales that are no number
    assert np.isfinite(run(module(), label, call, arrays, {"n": 3})).all()
