"""``tests/support/cuda_emulator``: what it refuses, and what it makes of generated source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.schedules.cuda import gemv
from llmc.schedules.gpu import append
from llmc.targets import cuda
from tests.kernels.harness import random_arrays
from tests.support.cuda_emulator import run, source
from tests.support.cuda_emulator.compiler import translate
from tests.support.cuda_emulator.instructions import body

TARGET = cuda.parse("cuda:sm_90a")


def _source() -> str:
    case = gemv.SHAPES["even_64x256"]
    config = {axis: values[0] for axis, values in gemv.space(case, TARGET).items()}
    return source(gemv.build(case, TARGET, config), TARGET)


def test_translated_source_holds_no_ptx() -> None:
    text = _source()
    assert "mma.sync" in text
    assert "asm" not in translate(text)


def test_unknown_instructions_are_named() -> None:
    text = _source().replace("tvm_builtin_ptx_mma_sync_aligned", "tvm_builtin_ptx_frobnicate")
    with pytest.raises(RuntimeError, match="does not know tvm_builtin_ptx_frobnicate"):
        translate(text)


def test_a_launch_gives_its_memory_back() -> None:
    """Shared memory lies below 4 GiB, where a process that runs hundreds of kernels would soon find none."""

    def low() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(int(line.split("-")[0], 16) < 1 << 32 for line in lines)

    case = append.SHAPES["odd_20_12_f32"]
    arrays = random_arrays(case, {"n": 2, "num_pages": 1}, seed=0)
    arrays[2] = np.arange(2, dtype=np.int32)
    before = low()
    run(append.build(case, TARGET, {}), TARGET, *arrays)
    assert low() == before


def test_a_store_is_no_load() -> None:
    assert body("tvm_builtin_ptx_st_global_b32", "uint64_t address, uint value") == (
        "auto v=value;memcpy((void*)(uintptr_t)address,&v,sizeof(v));"
    )
    assert body("tvm_builtin_ptx_unheard_of", "int a") is None
