"""``schedules/cuda/decode_attention.py`` on the CUDA emulator."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.cuda import decode_attention, decode_ring
from llmc.targets import cuda
from tests.kernels.harness import paged_arrays
from tests.kernels_cuda.emulated import call, check
from tests.support.cuda_emulator import source

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name in decode_attention.SHAPES if name != "heads_32x8_128"]


@pytest.mark.parametrize("name", SMALL)
def test_reference(name: str) -> None:
    case = decode_attention.SHAPES[name]
    assert decode_attention.matches(case, TARGET)
    arrays, symbols = paged_arrays(case, [211, 1, 48], [1, 1, 1], seed=5)
    result = call(decode_attention, case, TARGET, arrays, symbols, {"split": 2, "warps": 4, "least": 2, "many": 0})
    check(decode_attention, case, result, decode_attention.reference(case, *arrays))


def test_what_is_read_before_the_wait() -> None:
    """Lengths, block table and keys, but no query; in the kernels for many sequences a box of them is under way."""
    case = decode_attention.SHAPES["heads_32x8_128"]
    config = {axis: values[0] for axis, values in decode_attention.space(case, TARGET).items()}
    kernels = re.findall(
        r'extern "C" __global__[^;{]*\{\n(.*?)\n}', source(decode_attention.build(case, TARGET, config), TARGET), re.S
    )
    assert len(kernels) == 4
    for body in kernels:
        before, after = body.split("ptx_griddepcontrol_wait();")
        assert "lens_ptr" in before and "table_ptr" in before and "lens_ptr" not in after
        assert "q_ptr" not in before and "q_ptr" in after and "out_ptr" not in before
        assert ("pages_ptr" in before and "pages_ptr" in after) or ("bulk_tensor" in before and "bulk_tensor" in after)


@pytest.mark.parametrize(
    "config",
    [
        {"split": 8, "least": 4},
        {"split": 1, "warps": 1},
        {"split": 4, "warps": 2, "least": 1},
        {"fill": 16, "least": 1},  # two sequences of two heads: clusters of four
        {"fill": 7, "least": 1},
    ],
)
def test_configurations(config: dict[str, int]) -> None:
    case = decode_attention.SHAPES["group_3_64"]
    arrays, symbols = paged_arrays(case, [515, 17], [1, 1], seed=6)
    result = call(decode_attention, case, TARGET, arrays, symbols, config | {"dependent_launch": False, "many": 0})
    check(decode_attention, case, result, decode_attention.reference(case, *arrays))


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", [name for name in SMALL if decode_ring.takes(decode_attention.SHAPES[name])])
def test_many_sequences(name: str, parts: int) -> None:
    """``decode_ring``: pages of more than 32 chunks, of less than one, and a block that is not full."""
    case = decode_attention.SHAPES[name]
    arrays, symbols = paged_arrays(case, [600, 17, 1, 50, 33], [1] * 5, seed=9)
    pairs = 5 * int(case.args[1].shape[1])
    result = call(decode_attention, case, TARGET, arrays, symbols, {"many": pairs * parts})
    check(decode_attention, case, result, decode_attention.reference(case, *arrays))


def test_what_the_ring_takes() -> None:
    taken = {name for name, case in decode_attention.SHAPES.items() if decode_ring.takes(case)}
    assert taken >= {"heads_32x8_128", "group_8_128", "group_3_64", "group_12_64_softcap"}
    assert not taken & {"group_4_256_sinks", "group_1_80_f16", "group_16_96_window", "chunked_128_64"}


@pytest.mark.parametrize("many", [512, 1])
def test_padding_rows_are_finite(many: int) -> None:
    case = decode_attention.SHAPES["group_3_64"]
    arrays, symbols = paged_arrays(case, [3, 0], [1, 1], seed=4)
    config = {"split": 2, "warps": 1, "many": many}
    result = call(decode_attention, case, TARGET, arrays, symbols, config).astype(np.float32)
    assert np.isfinite(result).all()
    assert not result[1].any()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """As long as the batch is small enough for clusters of the same size."""
    case = decode_attention.SHAPES["group_16_96_window"]
    arrays, symbols = paged_arrays(case, [70, 90, 20], [1, 1, 1], seed=7)
    config = {"split": 2, "warps": 2, "least": 1, "many": 0}
    many = call(decode_attention, case, TARGET, arrays, symbols, config)
    alone = [arrays[0][1:2], arrays[1], arrays[2][1:2], arrays[3][1:2], np.array([0, 1], np.int32)]
    one = call(decode_attention, case, TARGET, alone, symbols | {"b": 1, "n": 1, "b+1": 2}, config)
    assert np.array_equal(many[1:2].view(np.uint16), one.view(np.uint16))


def test_what_it_does_not_take() -> None:
    case = decode_attention.SHAPES["group_3_64"]
    assert decode_attention.matches(replace(case, phase="extend"), TARGET) is None
    assert decode_attention.matches(case, cuda.parse("cuda:sm_90")) is None
    assert decode_attention.matches(decode_attention._call(17, 1, 64), TARGET) is None
    assert decode_attention.matches(decode_attention._call(2, 1, 72), TARGET) is None
    assert decode_attention.matches(decode_attention._call(2, 1, 64, page_size=8), TARGET) is None
