"""The vector functions against math over their whole range, on machines with and without fused multiply-add and half floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm
from tvm.tirx.script import builder as T

from llmc import targets
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, function, store
from llmc.schedules.cpu.math import Math
from llmc.schedules.protocol import TensorSpec
from llmc.targets import cpu
from tests.kernels.harness import DTYPES, tensor

N = 4096
TARGETS = ["cpu", "cpu:x86-64-v3", "cpu:x86-64"]


def compile_map(target: str, body: Callable[[Simd, Any, int], Any], source: str = "float32", result: str = "float32") -> Any:
    """``out[i] = body(x[i])`` over N values, a vector at a time."""
    machine = targets.parse(target)
    simd, symbols = Simd(machine), Symbols()
    lanes, shape = simd.lanes, (N // simd.lanes, simd.lanes)
    with function("main") as done:
        x, out = arguments(symbols, x=TensorSpec(shape, source), out=TensorSpec(shape, result))
        with T.serial(0, shape[0]) as i:
            value = body(simd, simd.load(x, i, 0, lanes=lanes), lanes)
            store(out, simd.narrow(value, result, lanes), i, 0, lanes=lanes)
    module = tvm.tirx.build(tvm.IRModule({"main": done()}), target=cpu.tvm_target(machine))

    def apply(values: np.ndarray) -> np.ndarray:
        out = tensor(np.zeros(shape, DTYPES[result]))
        module["main"](tensor(values.reshape(shape)), out)
        return out.numpy().reshape(-1)

    return apply


def reference(name: str, x: np.ndarray) -> np.ndarray:
    from llmc.dialect.linear import ACTIVATIONS

    x = x.astype(np.float64)
    if name in ACTIVATIONS:
        return ACTIVATIONS[name](x)
    return np.array([getattr(math, name)(v) for v in x])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "limit"), [("exp", 3e-7), ("tanh", 4e-7), ("erf", 4e-7)])
def test_functions(target: str, name: str, limit: float) -> None:
    wide = 80.0 if name == "exp" else 12.0
    x = np.concatenate([np.linspace(-wide, wide, N - 1000), np.linspace(-0.7, 0.7, 1000)]).astype(np.float32)
    result = compile_map(target, lambda simd, v, lanes: getattr(Math(simd, lanes), name)(v))(x)
    expected = reference(name, x)
    scale = np.abs(expected) if name == "exp" else np.maximum(np.abs(expected), 1e-3)
    assert np.max(np.abs(result - expected) / (scale if name != "erf" else 1.0)) < limit


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "none"])
def test_activations(name: str) -> None:
    x = np.linspace(-30, 30, N).astype(np.float32)
    result = compile_map("cpu", lambda simd, v, lanes: Math(simd, lanes).activate(name, v))(x)
    expected = reference(name, x)
    assert np.max(np.abs(result - expected) / np.maximum(1.0, np.abs(expected))) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_types_round_to_nearest_even(target: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    limit = 14 if dtype == "float16" else 60
    x = (rng.standard_normal(N) * 2.0 ** rng.uniform(-26, limit, N)).astype(np.float32)
    x[:8] = [0.0, -0.0, 65504.0, 1.0009765625 + 2**-11, 1 + 2**-11, 2**-24, 2**-25, -(2.0**-14)]
    narrowed = compile_map(target, lambda simd, v, lanes: v, result=dtype)(x)
    np.testing.assert_array_equal(narrowed.astype(np.float32), x.astype(DTYPES[dtype]).astype(np.float32))
    widened = compile_map(target, lambda simd, v, lanes: v, source=dtype)(x.astype(DTYPES[dtype]))
    np.testing.assert_array_equal(widened, x.astype(DTYPES[dtype]).astype(np.float32))
