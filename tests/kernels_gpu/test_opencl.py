"""Every portable kernel as OpenCL on this machine's processor, against its float64 reference.

Needs an OpenCL for the processor; without it they fail and say what to install. float16 is left to the emulator: OpenCL for
processors has no arithmetic in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.gpu import FAMILIES, append, attend_decode, attend_extend, gemm, moe, topk
from tests.kernels.harness import DTYPES, error, paged_arrays, random_arrays
from tests.kernels_cuda.emulated import TOLERANCE
from tests.support.opencl import run

pytestmark = pytest.mark.peer
TARGET = targets.parse("opencl:generic")


def _runs(call: Any) -> bool:
    return all(spec.dtype != "float16" for spec in (*call.args, call.result))


CASES = [(f, label) for f in FAMILIES for label, call in f.SHAPES.items() if _runs(call)]


@pytest.mark.parametrize(("family", "label"), CASES, ids=[f"{f.NAME}-{label}" for f, label in CASES])
def test_kernel(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    rng, symbols = np.random.default_rng(1), {"n": 130 if family is gemm else 7, "num_pages": 6}
    if family is attend_decode:
        arrays, symbols = paged_arrays(call, [131, 1, 700], [1, 1, 1], seed=3)
    elif family is attend_extend:
        arrays, symbols = paged_arrays(call, [140, 5, 8, 9], [20, 5, 0, 1], seed=3)
    else:
        arrays = random_arrays(call, symbols, seed=2)
    if family is append:
        arrays[2] = rng.permutation(6 * call.attr("page_size"))[:7].astype(np.int32)
        arrays[2][3] = -1
    if family is moe:
        arrays[1] = np.stack([rng.permutation(call.args[3].shape[0])[: call.attr("top_k")] for _ in range(7)]).astype(np.int32)
    config = {axis: values[0] for axis, values in family.space(call, TARGET).items()}
    kernel, expected = family.build(call, TARGET, config), family.reference(call, *arrays)
    if family is append:
        result = run(kernel, TARGET, *arrays)[3]
    else:
        start = -1 if family is topk else np.nan
        result = run(kernel, TARGET, *arrays, np.full(call.result.bind(symbols), start, DTYPES[call.result.dtype]))[-1]
    assert error(result, expected) <= (0 if family in (append, topk) else TOLERANCE[call.result.dtype])
