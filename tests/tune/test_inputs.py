"""Inputs and expected results against independent ones."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import torch

from llmc import targets
from llmc.errors import UnsupportedError
from llmc.runtime.tensors import storage_dtype
from llmc.schedules import cpu, cuda
from llmc.schedules.cpu import attend, linear, moe, quantized_moe, rope
from llmc.schedules.cuda import linear_call, linear_hopper, quantized_hopper
from llmc.schedules.gpu import quantized_call
from llmc.schedules.gpu import quantized_moe as gpu_quantized_moe
from llmc.schedules.parts import kept_under
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.tune import inputs
from llmc.tune.bench import Bench
from llmc.tune.build import compile_one
from llmc.tune.devices import open_device


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_and_widening(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(10_000, np.float32)
    values[:3] = (0.0, 1.00390625, -1.01171875)  # two ties of bfloat16
    wanted = values.astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype])
    stored = inputs.narrow(values, dtype)
    assert np.array_equal(stored, wanted.view(stored.dtype))
    assert np.array_equal(inputs.widen(stored, dtype), wanted.astype(np.float32))


def test_a_large_tensor_repeats_without_equal_rows() -> None:
    array = inputs.random(TensorSpec((2048, 1024), "float32"), {}, np.random.default_rng(0))
    assert array.shape == (2048, 1024)
    assert not (array[1:] == array[0]).all(axis=1).any()
    assert array[:1000].std() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("attrs", [{}, {"bias": 1, "residual": 1, "activation": "silu"}])
def test_expected_linear_is_torch_at_the_rows_and_columns_compared(attrs: dict[str, Any]) -> None:
    call, symbols = linear._call(1000, 96, "bfloat16", **attrs), {"n": 70}
    arrays = inputs.make(call, symbols)
    rows, columns = inputs.compared(call, symbols)
    assert (len(rows), len(columns)) == (inputs.COMPARED_ROWS, inputs.COMPARED_OUTPUTS)
    wide = [torch.from_numpy(inputs.widen(a, s.dtype)) for a, s in zip(arrays, call.args, strict=True)]
    result = wide[0] @ wide[1].T
    if attrs:
        result = torch.nn.functional.silu(result + wide[2]) + wide[3]
    found = inputs.expected(linear, call, symbols, arrays)
    assert np.allclose(found, result.numpy()[np.ix_(rows, columns)], atol=1e-4)


@pytest.mark.parametrize(("phase", "symbols"), [("decode", (3, 3, 50)), ("extend", (1, 20, 33))])
def test_expected_attention_is_torch(phase: str, symbols: tuple[int, int, int]) -> None:
    call = attend._call(4, 2, 16, page_size=8, phase=phase)
    batch, rows, context = symbols
    sizes = inputs._paged(call, batch, rows, context)
    q, pages, table, lengths, starts = inputs.make(call, sizes)
    assert sorted(table.ravel()) == list(range(sizes["num_pages"]))
    found = inputs.expected(attend, call, sizes, [q, pages, table, lengths, starts])
    kept, _ = inputs.compared(call, sizes)
    each = rows // batch
    wanted = np.empty((rows, 4, 16), np.float32)
    for s in range(batch):
        kv = pages[table[s]].reshape(-1, 2, 2, 8, 16)  # page, head, key or value, slot, element
        k, v = (torch.from_numpy(kv[:, :, i].transpose(1, 0, 2, 3).reshape(2, -1, 16)[:, :context]) for i in (0, 1))
        part = torch.from_numpy(q[s * each : (s + 1) * each]).permute(1, 0, 2)
        mask = torch.ones(each, context, dtype=torch.bool).tril(context - each)
        out = torch.nn.functional.scaled_dot_product_attention(part, k, v, attn_mask=mask, enable_gqa=True)
        wanted[s * each : (s + 1) * each] = out.permute(1, 0, 2).numpy()
    assert np.allclose(found, wanted[kept], atol=1e-5)


def test_expected_gated_linear_is_that_of_the_whole_matrix() -> None:
    call = linear_call.sample(2 * 650, 40, activation="silu_gated", bias=1, residual=1)
    arrays = inputs.make(call, {"n": 21})
    rows, columns = inputs.compared(call, {"n": 21})
    assert (len(rows), len(columns)) == (inputs.COMPARED_ROWS, inputs.COMPARED_OUTPUTS)
    whole = linear_hopper.reference(call, *(inputs.widen(a, "bfloat16") for a in arrays))
    assert np.allclose(inputs.expected(linear_hopper, call, {"n": 21}, arrays), whole[rows][:, columns], atol=1e-5)


@pytest.mark.parametrize("name", ["int4_g128", "int4p_g64", "q4_1", "int8", "fp8_e4m3"])
def test_quantized_weights_for_gpus_need_no_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a packed runner makes on a machine without one: all finite, results of about one."""
    monkeypatch.setitem(sys.modules, "llmc.tune.packed", None)
    call, symbols = quantized_call.make(48, 256, name, bias=1, residual=1), {"n": 5}
    arrays = inputs.make(call, symbols)
    for array, spec in zip(arrays, call.args, strict=True):
        assert (array.shape, array.dtype) == (spec.bind(symbols), storage_dtype(spec.dtype))
    wanted = inputs.expected(quantized_hopper, call, symbols, arrays)
    assert wanted.shape == (5, 48)
    assert 0.1 < np.std(wanted) < 1e3
    assert np.isfinite(wanted).all()


@pytest.mark.parametrize(
    ("family", "label"),
    [
        (moe, "odd_57_19"),
        (moe, "interleaved_bias"),
        (quantized_moe, "int4_two_of_eight_64x96"),
        (quantized_moe, "clipped_gate_64x40_mxfp4"),
        (quantized_moe, "interleaved_q4_k_256x24"),
    ],
)
def test_experts_have_inputs_and_a_right_kernel_passes(family: Any, label: str) -> None:
    """Every configuration of the space is right by the reference, at few rows and at more than are compared."""
    call, host = family.SHAPES[label], targets.parse("cpu")
    assert inputs.sizes(call, "cpu") == [{"n": 512}]
    sizes = [{"n": 1}, {"n": 37}]
    arrays = [inputs.make(call, s) for s in sizes]
    for made, symbols in zip(arrays, sizes, strict=True):
        for array, spec in zip(made, call.args, strict=True):
            assert (array.shape, array.dtype) == (spec.bind(symbols), storage_dtype(spec.dtype))
        ids = made[1]
        assert all(len(set(row)) == len(row) for row in ids.tolist())
    wanted = [inputs.expected(family, call, s, a) for s, a in zip(sizes, arrays, strict=True)]
    bench = Bench(open_device("cpu"), call, sizes, arrays, wanted)
    space = family.space(call, host)
    for point in itertools.product(*space.values()):
        bench.check(compile_one(family, call, host, dict(zip(space, point, strict=True)), sizes).kernel)


@pytest.mark.parametrize("families", [cpu.FAMILIES, cuda.FAMILIES], ids=["cpu", "cuda"])
def test_every_kernel_with_something_to_choose_has_inputs(families: Any) -> None:
    target = targets.parse("cpu:x86-64-v3" if families is cpu.FAMILIES else "cuda:sm_90a")
    for family in families:
        for call in family.SHAPES.values():
            if family.matches(call, target) and math.prod(map(len, family.space(call, target).values())) > 1:
                assert kept_under(family, call)[1].op in inputs.KNOWN


def test_experts_packed_for_gpus() -> None:
    call = gpu_quantized_moe.SHAPES[next(iter(gpu_quantized_moe.SHAPES))]
    arrays = inputs.make(call, {"n": 3})
    for array, spec in zip(arrays, call.args, strict=True):
        assert (array.shape, array.dtype) == (spec.bind({"n": 3}), storage_dtype(spec.dtype))
    assert np.isfinite(inputs.expected(gpu_quantized_moe, call, {"n": 3}, arrays)).all()


def test_error_is_of_the_largest_value_and_sees_nan() -> None:
    call, symbols = linear._call(5, 8), {"n": 3}
    wanted = np.zeros((3, 5), np.float32)
    wanted[1, 2] = -4.0
    result = wanted.copy()
    result[0, 0] = 1.0
    assert inputs.error(call, symbols, result, wanted) == pytest.approx(0.25)
    result[2, 4] = np.nan
    assert not inputs.error(call, symbols, result, wanted) <= inputs.tolerance(call)


def test_an_op_without_inputs_is_named() -> None:
    call = next(iter(rope.SHAPES.values()))
    with pytest.raises(UnsupportedError, match=r"llmc.rope: leave it out with --kernels"):
        inputs.make(call, {"n": 2})
    two = KernelCall("llmc.linear", (TensorSpec(("n", "k"), "float32"),), TensorSpec(("n",), "float32"))
    with pytest.raises(UnsupportedError, match="has the sizes k, n"):
        inputs.sizes(two, "cpu")
