"""``schedules/cuda/quantized_hopper.py`` on the CUDA emulator: the right kernel for every number of rows."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.cuda import quantized_gemm, quantized_gemv, quantized_ring
from llmc.schedules.cuda import quantized_hopper as family
from llmc.schedules.gpu.quantized_call import make
from llmc.targets import cuda
from tests.kernels.quantized_cases import operands
from tests.kernels_cuda.emulated import call, check

TARGET = cuda.parse("cuda:sm_90a")


@pytest.mark.parametrize(
    ("name", "n"),
    [("edges_136x328_q4_1", 8), ("edges_136x328_q4_1", 16), ("edges_136x328_q4_1", 17), ("edges_136x328_q4_1", 150),
     ("gated_160x264_int8_f16", 3), ("gated_160x264_int8_f16", 70), ("small_64x64_fp8", 40), ("small_64x64_fp8", 514)],
)  # fmt: skip
def test_every_number_of_rows(name: str, n: int) -> None:
    case = family.SHAPES[name]
    assert family.matches(case, TARGET)
    arrays = operands(case, n, seed=n)
    result = call(family, case, TARGET, arrays, {"n": n})
    check(family, case, result, family.reference(case, *arrays))


def test_the_choice_follows_the_configuration() -> None:
    """With a kernel in place of another, rows in its bucket are its own to the last bit."""
    case = family.SHAPES["edges_136x328_q4_1"]
    arrays = operands(case, 5, seed=3)
    chosen = family.candidates(case, "17-32")[0]
    own = {axis: value for axis, value in chosen.items() if axis != "kernel"}
    ours = call(family, case, TARGET, arrays, {"n": 5}, {"1-8": chosen})
    assert np.array_equal(ours.view(np.uint16), call(quantized_gemm, case, TARGET, arrays, {"n": 5}, own).view(np.uint16))


def test_a_ring_where_there_are_many_codes() -> None:
    """First choice between two sizes, if 8 rows of x fit; a kernel of its own to the last bit."""
    large = [
        (28672, 4096, "fp8_e4m3"),
        (128256, 4096, "int8"),
        (4096, 14336, "int8"),
        (4096, 4096, "int8"),
        (28672, 4096, "int4_g128"),
    ]
    first = [family.candidates(make(o, k, scheme), "1-8")[0]["kernel"] for o, k, scheme in large]
    assert first == ["ring", "gemv", "gemv", "gemv", "gemv"]
    first = [family.candidates(make(o, k, scheme), "1")[0]["kernel"] for o, k, scheme in large]
    assert first == ["ring", "gemv", "ring", "gemv", "gemv"]
    assert [family.candidates(make(*shape, "int8"), "1")[0]["kernel"] for shape in ((2048, 8192), (3072, 2048))] == ["ring", "gemv"]
    assert [family.candidates(make(*shape, "int8"), "1")[0]["columns"] for shape in ((4096, 14336), (2048, 8192))] == [1, 8]
    case = family.SHAPES["gated_160x264_int8_f16"]
    arrays = operands(case, 5, seed=3)
    chosen = next(c for c in family.candidates(case, "1-8") if c["kernel"] == "ring")
    own = {axis: value for axis, value in chosen.items() if axis != "kernel"}
    ours = call(family, case, TARGET, arrays, {"n": 5}, {"1-8": chosen})
    assert np.array_equal(ours.view(np.uint16), call(quantized_ring, case, TARGET, arrays, {"n": 5}, own).view(np.uint16))


def test_one_row_has_a_kernel_of_its_own() -> None:
    """Where the ring takes the matrix; two rows keep that of one to eight."""
    case = family.SHAPES["gated_160x264_int8_f16"]
    assert set(family.BUCKETS) - set(family.buckets(case)) == set()
    assert set(family.BUCKETS) - set(family.buckets(family.SHAPES["edges_136x328_q4_1"])) == {"1"}
    chosen = next(c for c in family.candidates(case, "1") if c["kernel"] == "ring" and c["columns"] == 1)
    own = {axis: value for axis, value in chosen.items() if axis != "kernel"}
    for n in (1, 2):
        arrays = operands(case, n, seed=3)
        ours = call(family, case, TARGET, arrays, {"n": n}, {"1": chosen})
        check(family, case, ours, family.reference(case, *arrays))
        if n == 1:
            assert np.array_equal(ours.view(np.uint16), call(quantized_ring, case, TARGET, arrays, {"n": n}, own).view(np.uint16))


@pytest.mark.parametrize(("o", "k"), [(64, 64), (4096, 4096), (28672, 4096), (128256, 2048), (32, 8)])
@pytest.mark.parametrize("activation", ["none", "silu_gated"])
def test_every_candidate_fits(o: int, k: int, activation: str) -> None:
    """Its sums the shared memory of a block, its rows of x the blocks that share a tile, its warps the most of a block."""
    case = make(o, k, "int4_g128", activation=activation)
    for rows in family.buckets(case):
        for config in family.candidates(case, rows):
            if config["kernel"] == "gemm":
                height, columns, resident = config["tile"]
                sides = 2 if activation == "silu_gated" else 1
                assert columns % config["split"] == 0
                assert quantized_gemm.stages(columns, resident, 4 * sides * columns * (height + 4)) >= 2
            else:
                assert config["columns"] == family.BUCKETS[rows] and config["warps"] <= 16


@pytest.mark.parametrize(
    ("o", "k", "activation", "rows", "tile", "split"),
    [
        (28672, 4096, "silu_gated", "33-64", (128, 64, 1), 1),  # 224 tiles of 64 outputs would take two rounds
        (16384, 2048, "silu_gated", "33-64", (64, 64, 1), 1),
        (28672, 4096, "silu_gated", "65-128", (128, 128, 1), 1),
        (16384, 2048, "silu_gated", "65-128", (128, 64, 1), 1),  # 64 tiles of 128 rows would leave half of the GPU idle
        (16384, 2048, "silu_gated", "129-512", (128, 128, 1), 1),
        (6144, 4096, "none", "129-512", (128, 256, 1), 1),  # 192 tiles of 128 rows: two rounds
        (4096, 4096, "none", "129-512", (128, 128, 1), 1),
        (4096, 4096, "none", "65-128", (128, 128, 1), 2),  # 32 clusters of four do not run at a time
        (2048, 8192, "none", "65-128", (128, 128, 1), 4),
        (2048, 8192, "none", "17-32", (64, 32, 3), 8),
    ],
)
def test_default_tiles(o: int, k: int, activation: str, rows: str, tile: tuple[int, int, int], split: int) -> None:
    """As measured: few rounds, and no more blocks of clusters than run at a time."""
    for scheme in ("int8", "int4_g128"):
        first = family.candidates(make(o, k, scheme, activation=activation), rows)[0]
        assert (tuple(first["tile"]), first["split"]) == (tile, split)


def test_tens_of_rows_by_a_long_k_stream() -> None:
    """Where 32 outputs to a block fill the GPU once."""
    streamed, others = [(4096, 14336), (3584, 18944)], [(2048, 8192), (8192, 28672), (4096, 4096)]
    for o, k in streamed + others:
        choices = family.candidates(make(o, k, "int8"), "17-32")
        assert choices[0]["kernel"] == ("gemv" if (o, k) in streamed else "gemm")
        assert {c["kernel"] for c in choices} == {"gemv", "gemm"} and choices.count(choices[0]) == 1


def test_defaults_for_small_matrices_leave_no_warp_without_work() -> None:
    for k in (64, 128, 300, 2048):
        warps, _, depth = quantized_gemv.default(make(64, k, "int4_g128"), 8)
        assert warps == 1 or (warps // 2) * depth < -(-k // 128)
