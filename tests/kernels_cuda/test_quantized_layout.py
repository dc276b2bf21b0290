"""``schedules/gpu/layout_mma.py``: packing is undone exactly, and puts a code where the kernels look for it."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.gpu import layout_mma
from llmc.targets import cpu, cuda
from tests.kernels.quantized_cases import random_quantized

SCHEMES = (
    "int4_g128", "int4", "int4z_g64", "int4p_g256", "int4_row", "int4p_row", "int8", "int8p", "q4_1", "q5_1", "q8_0", "fp8_e4m3",
    "fp8_e4m3_b128", "int3_g64_bf16",
)  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("o", "k"), [(16, 128), (33, 200), (1, 3), (48, 512)])
def test_round_trip(name: str, o: int, k: int) -> None:
    how = scheme(name)
    quantized = random_quantized(how, o, k, np.random.default_rng(o))
    assert layout_mma.takes(how, o, k, cuda.parse("cuda:sm_90a")) is None
    arrays = layout_mma.pack(quantized)
    assert {n: a.shape for n, a in arrays.items()} == {n: s.shape for n, s in layout_mma.parts(how, o, k).items()}
    back = layout_mma.unpack(arrays, how, o, k)
    for field in ("codes", "scales", "zeros", "minima"):
        wanted, found = getattr(quantized, field), getattr(back, field)
        assert (wanted is None) == (found is None)
        assert wanted is None or (wanted.dtype == found.dtype and np.array_equal(wanted, found)), field


def test_places_of_codes() -> None:
    tile, g, t, s, h, e = 1, 5, 3, 1, 1, 5
    quantized = random_quantized(scheme("int4_g128"), 32, 256, np.random.default_rng(0))
    word = int(layout_mma.pack(quantized)["codes"][tile, 2, 4 * g + t, 2 * s + h])
    assert word >> 4 * (e // 2 + 4 * (e % 2)) & 15 == quantized.codes[16 * tile + g + 8 * h, 64 * 2 + 32 * s + 8 * t + e]
    quantized = random_quantized(scheme("int8"), 32, 256, np.random.default_rng(0))
    word = int(layout_mma.pack(quantized)["codes"][tile, 2, 4 * g + t, 2 * h + 1])
    for e, byte in enumerate((0, 2, 1, 3)):
        assert word >> 8 * byte & 255 == quantized.codes[16 * tile + g + 8 * h, 32 * 2 + 8 * t + 4 + e]


def test_what_it_does_not_take() -> None:
    target = cuda.parse("cuda:sm_90a")
    assert "groups of 16" in str(layout_mma.takes(scheme("int8_g16"), 16, 64, target))
    assert "q6_k" in str(layout_mma.takes(scheme("q6_k"), 16, 256, target))
    assert "a layout for GPUs" in str(layout_mma.takes(scheme("int8"), 16, 64, cpu.parse("cpu:x86-64-v3")))
