"""Graphs whose activations are stored in two bytes: where arithmetic goes to float32 and back, and where it is not rounded."""

from __future__ import annotations

from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest
from tvm import relax
from tvm.relax import op

from llmc.dialect.core import attrs_of
from llmc.dialect.linear import linear
from llmc.dialect.norm import rms_norm
from llmc.passes.fuse_epilogue import fuse_epilogue
from llmc.passes.rewrite import op_name
from llmc.passes.shapes import dtype_of
from llmc.passes.widen import ARITHMETIC, widen
from tests.passes.test_patterns import Case

NARROW = ("bfloat16", "float16")


def narrow(c: Case, x: Any, dtype: str) -> Any:
    return c.e(op.astype(x, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_arithmetic_is_done_in_float32_and_rounded_where_it_is_stored(dtype: str) -> None:
    def body(c: Case, x: Any) -> Any:
        g = narrow(c, x, dtype)
        s = c.e(op.nn.silu(g))
        return op.multiply(s, c.e(op.add(g, g)))

    case = Case(body, 12)
    case.after(widen)
    for var, value in case.graph.bindings:
        if op_name(value) in ARITHMETIC:
            assert dtype_of(var) == "float32"
    last, _ = case.graph.bindings[-1]
    assert dtype_of(last) == dtype


def test_a_wide_graph_stays_as_it_is() -> None:
    case = Case(lambda c, x: op.multiply(c.e(op.nn.silu(x)), x), 12)
    before = [op_name(v) for _, v in case.graph.bindings]
    case.after(widen)
    assert [op_name(v) for _, v in case.graph.bindings] == before


@pytest.mark.parametrize("dtype", NARROW)
def test_a_norm_between_casts_reads_and_writes_the_narrow_type(dtype: str) -> None:
    def body(c: Case, x: Any) -> Any:
        wide = c.e(op.astype(narrow(c, x, dtype), "float32"))
        normed = c.e(rms_norm(wide, c.w("w", 12), eps=1e-5))
        return op.astype(normed, dtype)

    case = Case(body, 12)
    found = case.after(case.norms)
    assert found["llmc.rms_norm"] == 1
    (norm,) = [v for _, v in case.graph.bindings if op_name(v) == "llmc.rms_norm"]
    assert dtype_of(norm.args[0]) == dtype


@pytest.mark.parametrize("dtype", NARROW)
def test_logits_are_the_float32_sums(dtype: str) -> None:
    def body(c: Case, x: Any) -> Any:
        rows = narrow(c, x, dtype)
        weight = c.e(op.astype(c.w("w", 7, 12), dtype))
        return op.astype(c.e(linear(rows, weight)), "float32")

    case = Case(body, 12)
    case.after(fuse_epilogue)
    (var, value) = case.graph.bindings[-1]
    assert op_name(value) == "llmc.linear" and attrs_of(value)["out_dtype"] == "float32"
    assert dtype_of(var) == "float32" and isinstance(value, relax.Call)
