"""What every CUDA kernel family promises: the contract of ``schedules/protocol.py``, and both 16-bit types."""

from __future__ import annotations

from typing import Any

import pytest

from llmc import targets
from llmc.schedules.cuda import FAMILIES, gemm_hopper, gemm_split, quantized_gemm, quantized_ring, ring_gemv
from llmc.schedules.gpu import FAMILIES as PORTABLE

OWN = [family for family in FAMILIES if family not in PORTABLE]
KERNELS = [gemm_hopper, gemm_split, quantized_gemm, quantized_ring, ring_gemv]
"""Those that a family picks among by the number of rows: their calls are the family's."""

HOPPER, CPU = targets.parse("cuda:sm_90a"), targets.parse("cpu:x86-64-v3")


@pytest.mark.parametrize("family", OWN, ids=lambda family: family.NAME)
def test_a_family_takes_its_own_shapes_and_says_why(family: Any) -> None:
    for call in family.SHAPES.values():
        assert call.op == family.OP
        assert family.matches(call, HOPPER)
        assert family.matches(call, CPU) is None


@pytest.mark.parametrize("family", [*OWN, *KERNELS], ids=lambda family: family.NAME)
def test_what_a_perfect_kernel_moves_and_computes(family: Any) -> None:
    for call in family.SHAPES.values():
        moved, flops = family.roofline(call, n=3, b=3, m=2, r=3, slots=1, num_pages=4, context=10)
        assert moved > 0 and flops >= 0


@pytest.mark.parametrize("family", [*OWN, *KERNELS], ids=lambda family: family.NAME)
def test_both_16_bit_types_have_shapes(family: Any) -> None:
    if family.OP in ("llmc.sample_stats", "llmc.sample", "llmc.advance"):  # float32 logits and integers
        assert {call.args[0].dtype for call in family.SHAPES.values()} <= {"float32", "int32"}
        return
    assert {call.args[0].dtype for call in family.SHAPES.values()} >= {"bfloat16", "float16"}
