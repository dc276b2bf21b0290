"""``schedules/cuda/input_norm.py`` on the CUDA emulator: the kernels for a few rows take the norm of x themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.dialect.norm import rms_norm_reference
from llmc.schedules.cuda import gemv, input_norm, linear_call, quantized_gemv, quantized_ring, ring_gemv
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets import cuda
from tests.kernels.harness import DTYPES, random_arrays
from tests.kernels.quantized_cases import operands
from tests.kernels_cuda.emulated import check
from tests.support.cuda_emulator import run

TARGET = cuda.parse("cuda:sm_90a")
EPS = 1e-3


def arrays_of(case: KernelCall, n: int) -> list[np.ndarray]:
    """Operands with rows of very different sizes."""
    arrays = operands(case, n, seed=n) if case.attr("scheme") else random_arrays(case, {"n": n}, seed=n)
    sizes = np.exp2(np.arange(n) % 9 - 6)[:, None]
    return [(arrays[0] * sizes).astype(arrays[0].dtype), *arrays[1:]]


def emulate(family: Any, case: KernelCall, config: dict[str, Any], arrays: list[np.ndarray]) -> np.ndarray:
    full = {axis: values[0] for axis, values in family.space(case, TARGET).items()} | config
    out = np.full((len(arrays[0]), int(case.result.shape[1])), np.nan, DTYPES[case.result.dtype])
    return run(family.build(input_norm.normed(case, EPS), TARGET, full), TARGET, *arrays, out)[-1]


@pytest.mark.parametrize(
    ("family", "case", "n", "config"),
    [
        (gemv, linear_call.sample(48, 1360, bias=1), 1, {}),
        (gemv, linear_call.sample(38, 328, "float16", activation="silu_gated"), 5, {"warps": 2}),
        (gemv, linear_call.sample(19, 72, residual=1, out="float32"), 13, {"columns": 16}),
        (ring_gemv, linear_call.sample(48, 1344, bias=1), 3, {}),
        (ring_gemv, linear_call.sample(2600, 128, residual=1), 2, {}),
        (ring_gemv, linear_call.sample(96, 320, activation="gelu_gated"), 11, {"split": [4, 1], "ring": 24 << 10}),
        (quantized_ring, make(48, 1360, "fp8_e4m3", bias=1), 3, {}),
        (quantized_ring, make(96, 640, "int8", activation="gelu_gated"), 11, {"split": [4, 1], "ring": 40 << 10}),
        (quantized_gemv, make(48, 1360, "int4_g64", bias=1), 3, {}),
        (quantized_gemv, make(33, 352, "q4_1", residual=1), 8, {"warps": 1}),
        (quantized_gemv, make(64, 136, "int8", "float16", activation="silu_gated"), 9, {"columns": 16}),
        (gemv, linear_call.sample(56, 328), 29, {"columns": 32, "tiles": 2, "depth": 2}),
        (quantized_gemv, make(56, 392, "int4_g128"), 27, {"columns": 32, "tiles": 2, "depth": 2}),
    ],
    ids=lambda value: getattr(value, "NAME", None),
)
def test_reference(family: Any, case: KernelCall, n: int, config: dict[str, Any]) -> None:
    arrays = arrays_of(case, n)
    normal = rms_norm_reference(arrays[0], np.ones(arrays[0].shape[1]), eps=EPS)
    found = emulate(family, case, config, arrays)
    check(family, case, found, family.reference(case, normal, *arrays[1:]), case.args[0].dtype)


def test_rows_do_not_depend_on_the_batch() -> None:
    case = linear_call.sample(48, 1344)
    arrays = arrays_of(case, 11)
    many = emulate(ring_gemv, case, {}, arrays)
    one = emulate(ring_gemv, case, {}, [arrays[0][9:10], *arrays[1:]])
    assert np.array_equal(many[9:10].view(np.uint16), one.view(np.uint16))


def test_a_call_with_and_without_its_norm() -> None:
    for case in (linear_call.sample(48, 64, bias=1, residual=1, out="float32"), make(48, 136, "int4_g64")):
        whole = input_norm.normed(case, EPS)
        assert (whole.op, whole.args, whole.attr("eps")) == ("llmc.norm_linear", case.args, EPS)
        assert input_norm.plain(whole) == case == input_norm.plain(case)
