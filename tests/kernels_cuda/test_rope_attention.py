"""``schedules/cuda/rope_attention.py`` on the CUDA emulator: decode attention with rotation and append inside."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.dialect.rope_attend import INPUTS, STATE
from llmc.schedules.cuda import decode_ring, rope_attention
from llmc.schedules.cuda.decode_rotation import attend_call
from llmc.schedules.protocol import KernelCall
from llmc.targets import cuda
from tests.kernels.harness import paged_arrays, random_arrays
from tests.kernels_cuda.emulated import after, check
from tests.support.cuda_emulator import source

TARGET = cuda.parse("cuda:sm_90a")
SMALL = [name for name in rope_attention.SHAPES if name != "heads_32x8_128"]
RING = [name for name in SMALL if decode_ring.takes(rope_attention.SHAPES[name])]
LENGTHS = [131, 1, 48, 65, 0]
"""The new position is in the middle of a page, the only one, the last of a page, the first of one; and none: padding."""


def arrays_of(case: KernelCall, lengths: list[int], seed: int) -> tuple[list[np.ndarray], dict[str, int]]:
    """Operands of a call. The slots of the new positions hold NaN, which a kernel that read them would give back."""
    page_size = int(case.attr("page_size"))
    attention, symbols = paged_arrays(attend_call(case), lengths, [1] * len(lengths), seed)
    _, pages, table, lens, starts, *_ = attention
    arrays = random_arrays(case, symbols, seed + 1)
    last = np.maximum(lens - 1, 0)
    slots = table[np.arange(len(lens)), last // page_size] * page_size + last % page_size
    slots[lens == 0] = -1
    wiped = pages.copy()
    d, dv = (attend_call(case).args[0].shape[2], int(case.attr("v_dim")))
    for slot in slots[slots >= 0]:
        page, at = divmod(int(slot), page_size)
        wiped[page, :, at * d : (at + 1) * d] = np.nan
        wiped[page, :, page_size * d + at * dv : page_size * d + (at + 1) * dv] = np.nan
    arrays[3:INPUTS] = [slots.astype(np.int32), wiped]
    arrays[INPUTS : INPUTS + STATE] = [table, lens, starts]
    return arrays, symbols


def checked(case: KernelCall, lengths: list[int], config: dict[str, Any], seed: int = 5) -> list[np.ndarray]:
    """The operands after the kernel ran, and its result; both compared with the reference."""
    arrays, symbols = arrays_of(case, lengths, seed)
    found = after(rope_attention, case, TARGET, arrays, symbols, config)
    full = arrays[6] > 0  # the reference knows no sequence without positions
    rows = [a[full] if i in (0, 1, 2, 3, 5, 6) else a for i, a in enumerate(arrays)]
    rows[7] = np.arange(full.sum() + 1, dtype=np.int32)
    out, pages = rope_attention.reference(case, *rows)
    check(rope_attention, case, found[-1][full], out)
    assert not found[-1][~full].any()
    written = np.isnan(arrays[4].astype(np.float32))
    assert not np.isnan(found[4].astype(np.float32)).any()
    check(rope_attention, case, found[4][written], pages.astype(np.float64)[written])
    assert np.array_equal(found[4][~written], arrays[4][~written]), "the kernel wrote beside its slots"
    return found


@pytest.mark.parametrize("name", SMALL)
def test_reference(name: str) -> None:
    case = rope_attention.SHAPES[name]
    assert rope_attention.matches(case, TARGET)
    checked(case, LENGTHS, {"split": 2, "warps": 2, "least": 2, "many": 0})


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2, 4])
@pytest.mark.parametrize("name", RING)
def test_many_sequences(name: str, parts: int) -> None:
    case = rope_attention.SHAPES[name]
    pairs = len(LENGTHS) * int(case.args[4].shape[1])
    checked(case, LENGTHS, {"many": pairs * parts}, seed=9)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("many", [0, 1])
def test_where_the_new_position_lies(many: int, page_size: int) -> None:
    """Every place of a chunk, and the first of a page and of a block's part, where it is alone."""
    case = rope_attention._call(4, 2, 64, page_size=page_size)
    lengths = [*range(1, 18), 2 * page_size + 1, 129]
    checked(case, lengths, {"many": many, "split": 4, "least": 1, "warps": 2, "dependent_launch": False})


@pytest.mark.parametrize("split", [1, 8])
def test_configurations(split: int) -> None:
    case = rope_attention.SHAPES["group_3_64"]
    checked(case, [515, 17], {"split": split, "warps": 1 if split == 1 else 8, "least": 4, "many": 0})


def test_what_is_read_before_the_wait() -> None:
    """Lengths, block table and every page that is read, but neither rows nor tables; only the new position is written to pages."""
    case = rope_attention.SHAPES["heads_32x8_128"]
    config = {axis: values[0] for axis, values in rope_attention.space(case, TARGET).items()}
    kernels = re.findall(
        r'extern "C" __global__[^;{]*\{\n(.*?)\n}', source(rope_attention.build(case, TARGET, config), TARGET), re.S
    )
    assert len(kernels) == 4
    for body in kernels:
        before, rest = body.split("ptx_griddepcontrol_wait();")
        assert "lens_ptr" in before and "table_ptr" in before and "lens_ptr" not in rest
        assert not re.search(r"\b(qkv|cos|sin)_ptr\b", before) and re.search(r"\bqkv_ptr\b", rest)
        assert "pages_ptr" in before or "bulk_tensor" in before


def test_what_the_ring_takes() -> None:
    assert {"norm_group_8_128", "group_3_64", "group_12_64_softcap"} <= set(RING)
    assert decode_ring.takes(rope_attention.SHAPES["heads_32x8_128"])
    assert decode_ring.depth(rope_attention.SHAPES["heads_32x8_128"]) == 3


def test_steps_one_after_another_are_one_long_row_of_positions() -> None:
    """Each step reads what the one before it wrote, over a page's end; twice the same bits."""
    case = rope_attention._call(4, 2, 64, norm=1)
    config = {"split": 2, "least": 1, "warps": 2, "many": 0}
    arrays, symbols = arrays_of(case, [40, 33], 3)
    arrays[4] = np.nan_to_num(arrays[4].astype(np.float32)).astype(arrays[4].dtype)
    runs = []
    for _ in range(2):
        state = [a.copy() for a in arrays]
        state[6] -= 12
        for _ in range(12):
            state[6] += 1
            last = state[6] - 1
            state[3] = (state[5][np.arange(2), last // 16] * 16 + last % 16).astype(np.int32)
            *state, out = after(rope_attention, case, TARGET, state, symbols, config)
        check(rope_attention, case, out, rope_attention.reference(case, *state)[0])
        runs.append((out.view(np.uint16), state[4].view(np.uint16)))
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_it_does_not_take() -> None:
    case = rope_attention.SHAPES["group_3_64"]
    assert rope_attention.matches(replace(case, phase="extend"), TARGET) is None
    assert rope_attention.matches(case, cuda.parse("cuda:sm_90")) is None
    assert rope_attention.matches(rope_attention._call(2, 1, 64, rotary=6), TARGET) is None
    assert rope_attention.matches(rope_attention._call(2, 1, 64, rotary=6, interleaved=1), TARGET)
    coded = dict(case.attrs) | {"kv_scheme": "int8"}
    assert rope_attention.matches(replace(case, attrs=tuple(sorted(coded.items()))), TARGET) is None
