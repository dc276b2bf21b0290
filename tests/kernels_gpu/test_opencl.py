"""Every portable kernel as OpenCL on this machine's processor, against its float64 reference.

Needs an OpenCL for the processor; without it they fail and say what to install. Kernels with float16 operands, scales of quantized
weights included, are left to the emulator: OpenCL for processors has no such type.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmc import targets
from llmc.schedules.gpu import FAMILIES, append, topk
from tests.kernels_cuda.emulated import TOLERANCE
from tests.kernels_gpu.cases import arguments, errors, operands
from tests.support.opencl import run

pytestmark = pytest.mark.peer
TARGET = targets.parse("opencl:generic")


def _runs(family: Any, call: Any) -> bool:
    return family.matches(call, TARGET) is not None and all(spec.dtype != "float16" for spec in (*call.args, call.result))


CASES = [(f, label) for f in FAMILIES for label, call in f.SHAPES.items() if _runs(f, call)]


@pytest.mark.parametrize(("family", "label"), CASES, ids=[f"{f.NAME}-{label}" for f, label in CASES])
def test_kernel(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    arrays, symbols = operands(family, call, 130 if "gemm" in family.NAME else 7)
    config = {axis: values[0] for axis, values in family.space(call, TARGET).items()}
    after = run(family.build(call, TARGET, config), TARGET, *arguments(family, call, arrays, symbols))
    for dtype, found in errors(family, call, arrays, after).items():
        assert found <= (0 if family in (append, topk) and dtype != "uint8" else TOLERANCE[dtype])
