"""The matrix instructions as data (``targets/limits.py``), and as the emulator runs them, against the published layouts."""

from __future__ import annotations

import pytest

from llmc.targets.limits import MFMA, MMA, SIMDGROUP, WMMA, WMMA_12
from llmc.targets.rocm import _MATRIX

# AMD, "Matrix Instruction Calculator": where an element of an operand, and of the result, is: the lane, and its place there.
PUBLISHED = {
    "v_mfma_f32_16x16x16_bf16": (
        MFMA, 64, lambda i, k: [(i + 16 * (k // 4), k % 4)], lambda i, j: (j + 16 * (i // 4), i % 4),
    ),
    "v_wmma_f32_16x16x16_bf16 (RDNA3)": (
        WMMA, 32, lambda i, k: [(i, k), (i + 16, k)], lambda i, j: (j + 16 * (i % 2), i // 2),
    ),
    "v_wmma_f32_16x16x16_bf16 (RDNA4)": (
        WMMA_12, 32, lambda i, k: [(i + 16 * (k // 8), k % 8)], lambda i, j: (j + 16 * (i // 8), i % 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_lanes_hold_what_the_instruction_reads(name: str) -> None:
    how, lanes, operand, result = PUBLISHED[name]
    m, n, k = how.shape
    held = {}
    for lane in range(lanes):
        for e in range(how.width):
            held.setdefault((lane % m, (lane // m * how.width) % k + e), []).append((lane, e))
    assert held == {(i, kk): operand(i, kk) for i in range(m) for kk in range(k)}
    by_lane, by_element = how.strides
    sums = {(by_lane * (lane // n) + by_element * e, lane % n): (lane, e) for lane in range(lanes) for e in range(m * n // lanes)}
    assert sums == {(i, j): result(i, j) for i in range(m) for j in range(n)}


def test_every_instruction_has_a_name_in_the_code_generator() -> None:
    for how in (MFMA, WMMA, WMMA_12):
        assert {name for _, name, _ in how.operands} <= set(_MATRIX)
    assert [MMA.name(d).split(".")[-2] for d in ("bfloat16", "float16")] == ["bf16", "f16"]
    assert SIMDGROUP.held_as("bfloat16") == "float32" and SIMDGROUP.held_as("float16") == "float16"
    assert not SIMDGROUP.takes("float32")
