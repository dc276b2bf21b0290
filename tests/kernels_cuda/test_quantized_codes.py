"""``schedules/cuda/quantized_codes.py`` on the CUDA emulator: in every kernel every code of 8 bits becomes its value."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.passes.quantize.scheme import QuantizedTensor, scheme
from llmc.schedules.cuda import quantized_gemm, quantized_gemv, quantized_ring
from llmc.schedules.gpu import layout_mma
from llmc.schedules.gpu.quantized_call import make
from llmc.targets import cuda
from tests.kernels.harness import DTYPES
from tests.kernels_cuda.emulated import call

TARGET = cuda.parse("cuda:sm_90a")
CODES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def _values(name: str) -> np.ndarray:
    """What the codes stand for, float32; e4m3 has no number for 0x7F and 0xFF, which kernels take for +-480."""
    if name == "int8":
        return CODES.astype(np.float32) - 128
    values = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.where(np.isnan(values), np.where(CODES < 128, 480, -480), values).astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("family", [quantized_gemv, quantized_ring, quantized_gemm], ids=lambda f: f.NAME)
def test_every_code(family: Any, name: str, dtype: str) -> None:
    how = scheme(name)
    case = make(16, 16, name, dtype, out="float32")
    packed = layout_mma.pack(QuantizedTensor(how, CODES, np.ones((16, 1), DTYPES[how.scale_dtype])))
    one_hot = np.eye(16, dtype=DTYPES[dtype])
    found = call(family, case, TARGET, [one_hot, packed["codes"], packed["scales"]], {"n": 16})
    assert np.array_equal(found, _values(name).T)
