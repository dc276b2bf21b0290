"""The schedule of PrimFuncs that Relax legalised and fused: same results, vectors, and no thread for a little work."""

from __future__ import annotations

from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from llmc import targets
from llmc.schedules.cpu.elementwise import schedule
from llmc.targets import cpu
from tests.kernels.harness import tensor

HOST = targets.parse("cpu")


def lowered(shape: tuple[int | str, ...], body: Any, dtype: str = "float32") -> tvm.IRModule:
    """``main(x)`` with Relax operators, legalised and fused."""
    builder, symbol = relax.BlockBuilder(), tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([symbol if d == "n" else d for d in shape], dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(body(x))
        builder.emit_func_output(out)
    steps = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return tvm.transform.Sequential([*steps, relax.transform.DeadCodeElimination(["main"])])(builder.get())


def scheduled(module: tvm.IRModule) -> list[tirx.PrimFunc]:
    functions = []
    for var, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc):
            functions.append(schedule(function, HOST))
            module.update_func(var, functions[-1])
    return functions


def gated(x: Any) -> Any:
    return relax.op.multiply(
        relax.op.nn.silu(relax.op.strided_slice(x, [1], [0], [96])), relax.op.strided_slice(x, [1], [96], [192])
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_experts(x: Any) -> Any:
    """A symbolic dimension that is not the first: [3, n, 8] times one matrix per expert."""
    each = relax.op.broadcast_to(relax.op.expand_dims(x, 0), (3, x.ty.shape[0], 8))
    return relax.op.matmul(each, relax.const(EXPERTS))


def scattered(x: Any) -> Any:
    """An opaque operator: every row's second and last value become the first two of the row."""
    ids = relax.op.broadcast_to(relax.const(np.array([1, 4], np.int32)), (x.ty.shape[0], 2))
    return relax.op.scatter_elements(x, ids, relax.op.strided_slice(x, [1], [0], [2]), axis=1)


EXPERTS = np.random.default_rng(5).standard_normal((3, 8, 11)).astype(np.float32)
CASES: dict[str, tuple[tuple[int | str, ...], Any, Any]] = {
    "gated": (("n", 192), gated, lambda x: x[:, :96] * sigmoid(x[:, :96]) * x[:, 96:]),
    "odd": (("n", 57), lambda x: relax.op.tanh(relax.op.multiply(x, x)), lambda x: np.tanh(x * x)),
    "softmax": (("n", 57), relax.op.nn.softmax, softmax),
    "sum": (("n", 3, 20), lambda x: relax.op.sum(relax.op.exp(x), axis=[2]), lambda x: np.exp(x).sum(2)),
    "transpose": (("n", 5, 16), lambda x: relax.op.permute_dims(x, [1, 0, 2]), lambda x: x.transpose(1, 0, 2)),
    "static": ((700, 64), lambda x: relax.op.add(x, x), lambda x: x + x),
    "scalar_rows": (("n",), lambda x: relax.op.exp(x), np.exp),
    "experts": (("n", 8), by_experts, lambda x: x[None] @ EXPERTS.astype(np.float64)),
    "scatter": (("n", 5), scattered, lambda x: np.stack([x[:, 0], x[:, 0], x[:, 2], x[:, 3], x[:, 1]], 1)),
    "everything": (("n", 16), lambda x: relax.op.max(x), lambda x: x.max()),
}


@pytest.mark.parametrize("name", list(CASES))
def test_results_are_unchanged(name: str) -> None:
    shape, body, expected = CASES[name]
    module = lowered(shape, body)
    assert scheduled(module)
    vm = relax.VirtualMachine(relax.build(module, cpu.tvm_target(HOST)), tvm.cpu())
    for n in (1, 3, 700):
        x = np.random.default_rng(n).standard_normal([n if d == "n" else d for d in shape]).astype(np.float32)
        np.testing.assert_allclose(vm["main"](tensor(x)).numpy(), expected(x.astype(np.float64)), rtol=1e-5, atol=1e-6)


def test_producers_are_inlined_and_threads_start_only_for_enough_work() -> None:
    (function,) = scheduled(lowered(*CASES["gated"][:2]))
    text = function.script()
    assert "sblock_alloc_buffer" not in text and "T.vectorized" in text
    assert "T.parallel" in text and f"T.int64({32768})" in text
    assert schedule(function, HOST) is function


def test_a_small_static_function_stays_on_one_thread() -> None:
    (function,) = scheduled(lowered((4, 64), lambda x: relax.op.add(x, x)))
    assert "T.parallel" not in function.script()


def test_exp_makes_no_call_into_libm() -> None:
    module = lowered(("n", 64), relax.op.exp)
    scheduled(module)
    executable = relax.build(module, cpu.tvm_target(HOST))
    assembly = "".join(m.inspect_source("asm") for m in executable.mod.imports if m.kind == "llvm")
    assert assembly and "expf" not in assembly
