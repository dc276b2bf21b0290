"""The roofline that kernels are held against."""

from __future__ import annotations

import pytest

from llmc import targets
from llmc.schedules.cpu import linear, quantized_linear
from llmc.tune.limits import Limits
from llmc.tune.task import make


@pytest.mark.parametrize(
    "target, factor",
    [
        ("cpu:x86-64-v4+avx512vnni", 4),
        ("cpu:aarch64+dotprod", 4),
        ("cpu:aarch64+dotprod+i8mm", 8),
        ("cpu:x86-64-v3", 2),
        ("cpu:x86-64-v2", 1),
    ],
)
def test_integer_products_are_held_against_integer_instructions(target: str, factor: int) -> None:
    limits, at = Limits(bandwidth=1e15, flops=1e12), targets.parse(target)
    task = make(quantized_linear, quantized_linear.SHAPES["down_576x1536_q4_0_residual"], at)[0]
    assert limits.seconds(task, {"n": 512}) == pytest.approx(2 * 512 * 576 * 1536 / (factor * 1e12))


def test_float_products_are_held_against_float_instructions() -> None:
    limits, at = Limits(bandwidth=1e15, flops=1e12), targets.parse("cpu:x86-64-v4+avx512vnni")
    call = next(c for c in linear.SHAPES.values() if linear.matches(c, at))
    o, k = call.args[1].shape
    assert limits.seconds(make(linear, call, at)[0], {"n": 512}) == pytest.approx(2 * 512 * int(o) * int(k) / 1e12)
