"""``schedules/cuda/norm_linear.py`` and ``row_norm.py`` on the CUDA emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.dialect.norm import rms_norm_reference
from llmc.schedules import lookup as L
from llmc.schedules import parts
from llmc.schedules import records as R
from llmc.schedules.cuda import linear_call, linear_hopper, row_norm
from llmc.schedules.cuda import norm_linear as family
from llmc.schedules.cuda.input_norm import normed, plain
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets import cuda
from tests.kernels.harness import error, random_arrays
from tests.kernels.quantized_cases import operands
from tests.kernels_cuda.emulated import TOLERANCE, call, check
from tests.support.cuda_emulator import run
from tests.support.tuning import verdict

TARGET = cuda.parse("cuda:sm_90a")


def arrays_of(case: KernelCall, n: int) -> list[np.ndarray]:
    linear = plain(case)
    return operands(linear, n, seed=n) if linear.attr("scheme") else random_arrays(linear, {"n": n}, seed=n)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("edges_136x328", 5), ("edges_136x328", 17), ("gated_144x264_f16", 3), ("gated_144x264_f16", 9),
        ("edges_136x328_int8", 2), ("edges_136x328_int8", 3), ("edges_136x328_int8", 20),
    ],
)  # fmt: skip
def test_every_number_of_rows(name: str, n: int) -> None:
    case = family.SHAPES[name]
    assert family.matches(case, TARGET)
    arrays = arrays_of(case, n)
    result = call(family, case, TARGET, arrays, {"n": n})
    check(family, case, result, family.reference(case, *arrays), "bfloat16")


@pytest.mark.parametrize(
    ("scheme", "chosen", "most"),
    [
        ("", {"kernel": "ring_gemv"}, 8), ("", {"kernel": "gemv"}, 8), ("", {"kernel": "gemm_hopper"}, 0),
        ("", {"kernel": "gemm_split"}, 0),
        ("int8", {"kernel": "ring"}, 8), ("int8", {"kernel": "gemv"}, 2), ("int8", {"kernel": "gemm"}, 0),
    ],
)  # fmt: skip
def test_which_kernels_take_the_norm(scheme: str, chosen: dict[str, Any], most: int) -> None:
    linear = make(64, 128, scheme) if scheme else linear_call.sample(64, 128)
    assert family._most_inside(linear, chosen) == most


@pytest.mark.parametrize(("k", "dtype"), [(72, "float16"), (4104, "bfloat16"), (8, "bfloat16")])
def test_rows(k: int, dtype: str) -> None:
    x, _ = random_arrays(linear_call.sample(1, k, dtype), {"n": 3}, seed=k)
    x = (x * np.array([[1e-3], [1], [30]])).astype(x.dtype)
    found = run(row_norm.kernel(k, dtype, 1e-5, True), TARGET, x, np.full_like(x, np.nan))[-1]
    assert error(found, rms_norm_reference(x, np.ones(k), eps=1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "axis", "n"), [("edges_136x328", "1-8", 5), ("edges_136x328", "17-32", 17), ("edges_136x328_int8", "1-8", 3)]
)
def test_a_range_of_rows_alone(name: str, axis: str, n: int) -> None:
    case = family.SHAPES[name]
    config = {axis: family.space(case, TARGET)[axis][0]}
    alone = family.build(case, TARGET, config)
    assert len(alone.script()) < len(family.build(case, TARGET, parts_default(case)).script()) / 2
    arrays = arrays_of(case, n)
    result = run(alone, TARGET, *arrays, np.full((n, 136), np.nan, arrays[0].dtype))[-1]
    check(family, case, result, family.reference(case, *arrays), "bfloat16")


def parts_default(case: KernelCall) -> dict[str, Any]:
    return {axis: values[0] for axis, values in family.space(case, TARGET).items()}


def test_records_are_those_of_the_linear() -> None:
    case = family.SHAPES["edges_136x328"]
    linear = parts.kept_under(family, case)[1]
    assert parts.kept_under(family, case) == parts.kept_under(linear_hopper, linear) == (linear_hopper, linear)
    other = linear_hopper.candidates(linear, "9-16")[1]
    known = L.Records()
    record = R.Record(
        linear_hopper.NAME, linear, (("n", 16),), TARGET.name, R.machine_class(TARGET), "a GPU", R.config_text({"9-16": other}),
        1e-6, 0.0, "", R.source_hash(linear_hopper, R.config_text({"9-16": other})), "llmc test",
    )  # fmt: skip
    known.add(record)
    known.add(verdict(record))
    found = known.lookup(family, case, TARGET)
    assert found is not None and found.config["9-16"] == other
    assert found.config.keys() == family.space(case, TARGET).keys()


def test_what_it_does_not_take() -> None:
    case = family.SHAPES["edges_136x328"]
    assert family.matches(replace(case, op="llmc.linear"), TARGET) is None
    assert family.matches(case, cuda.parse("cuda:sm_90")) is None
    assert family.matches(normed(linear_call.sample(20, 64)), TARGET) is None, "the linear is none of the family's"
    assert family.matches(normed(make(64, 64, "int4_g32", "float32")), TARGET) is None


def test_roofline() -> None:
    case = family.SHAPES["gated_144x264_f16"]
    assert family.roofline(case, n=2) == (2 * (2 * 264 + 144 * 264 + 2 * 72), 2 * 2 * 264 * 144)
