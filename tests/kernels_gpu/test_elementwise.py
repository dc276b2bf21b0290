"""The GPU schedule of PrimFuncs that Relax legalised and fused: same results through the emulator, a thread for every element."""

from __future__ import annotations

from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from llmc import targets
from llmc.schedules.gpu.elementwise import schedule
from llmc.targets import cuda
from tests.kernels.harness import DTYPES
from tests.kernels.test_cpu_elementwise import CASES, lowered
from tests.support.cuda_emulator import run, source

TARGET = targets.parse("cuda:sm_80")


def execute(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    """``main`` of a module of scheduled PrimFuncs, call by call."""
    main = module["main"]
    values: dict[Any, np.ndarray] = {main.params[0]: x}
    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Var):
                values[binding.var] = values[call]
                continue
            assert call.op.name == "relax.call_tir"
            arrays = [values[a] if a in values else a.value.numpy() for a in call.args[1].fields]
            shape = [int(d) if isinstance(d, tirx.IntImm) else x.shape[0] for d in binding.var.ty.shape]
            out = np.full(shape, np.nan, DTYPES[str(binding.var.ty.dtype)])
            values[binding.var] = run(module[call.args[0]], TARGET, *arrays, out)[-1]
    return values[main.body.body]


def scheduled(module: tvm.IRModule) -> tvm.IRModule:
    for var, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc):
            module.update_func(var, schedule(function, TARGET))
    return module


@pytest.mark.parametrize("name", list(CASES))
def test_results_are_unchanged(name: str) -> None:
    shape, body, expected = CASES[name]
    module = scheduled(lowered(shape, body))
    for n in (1, 3, 70):
        x = np.random.default_rng(n).standard_normal([n if d == "n" else d for d in shape]).astype(np.float32)
        np.testing.assert_allclose(execute(module, x), expected(x.astype(np.float64)), rtol=1e-5, atol=1e-6)


def test_a_scatter_that_tvm_legalises_with_threads_of_its_own() -> None:
    shape, body, expected = CASES["scatter"]
    with cuda.tvm_target(TARGET):
        module = scheduled(lowered(shape, body))
    x = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    np.testing.assert_allclose(execute(module, x), expected(x), rtol=1e-6)


def test_truth_values_are_not_vectors() -> None:
    """A negated comparison, innermost dimension a multiple of four."""
    module = scheduled(lowered(("n", 64), unless_positive))
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_array_equal(execute(module, x), np.where(x > 0, x, 2 * x))
    assert "short2" not in source(next(f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)), TARGET)


def unless_positive(x: Any) -> Any:
    zero = relax.const(0.0, "float32")
    return relax.op.where(relax.op.logical_not(relax.op.greater(x, zero)), relax.op.add(x, x), x)


def narrow(body: Any, dtype: str) -> Any:
    """``body`` in float32 between casts, as the pass ``widen`` leaves it."""
    return lambda x: relax.op.astype(body(relax.op.astype(x, "float32")), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gated", "odd", "softmax", "transpose", "sum"])
def test_narrow_types_are_rounded_once(name: str, dtype: str) -> None:
    shape, body, expected = CASES[name]
    module = scheduled(lowered(shape, narrow(body, dtype), dtype))
    x = np.random.default_rng(5).standard_normal([5 if d == "n" else d for d in shape]).astype(DTYPES[dtype])
    result = execute(module, x)
    assert result.dtype == DTYPES[dtype]
    np.testing.assert_allclose(result.astype(np.float64), expected(x.astype(np.float64)), rtol=2.0**-8, atol=1e-6)


def test_producers_are_inlined_and_neighbours_are_stored_together() -> None:
    module = scheduled(lowered(*CASES["gated"][:2]))
    (function,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    assert "sblock_alloc_buffer" not in function.script()
    assert "float4" in source(function, TARGET)
    assert schedule(function, TARGET) is function
