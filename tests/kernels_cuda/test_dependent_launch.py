"""Every simple and every generated kernel starts with the release and the wait of a dependent launch, where the GPU has them."""

from __future__ import annotations

import re
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
from tvm import te

from llmc import targets
from llmc.schedules.cuda import FAMILIES, gemm_split, gemv, quantized_gemv, quantized_ring, ring_gemv
from llmc.schedules.gpu import append, elementwise, moe, rope, rope_append, topk
from llmc.schedules.gpu.norm import layer_norm, rms_norm
from llmc.targets import dependent_launch
from tests.support.cuda_emulator import run, source

HOPPER, AMPERE = targets.parse("cuda:sm_90a"), targets.parse("cuda:sm_80")
KERNEL = re.compile(r'extern "C" __global__[^;{]*\{\n(.*?)\n}', re.S)


def _sigmoid_sum() -> Any:
    """Two kernels in one function: a reduction cannot be inlined into what reads it."""
    n = te.var("n", "int64")
    x = te.placeholder((n, 6), "float32", "x")
    k = te.reduce_axis((0, 6), "k")
    total = te.compute((n,), lambda i: te.sum(x[i, k], axis=k), "total")
    return te.create_prim_func([x, te.compute((n, 6), lambda i, j: te.sigmoid(x[i, j]) / total[i], "y")])


def _kernels(function: Any, target: Any) -> list[str]:
    return KERNEL.findall(source(function, target))


@pytest.mark.parametrize("family", [append, moe, rope, rope_append, topk], ids=lambda f: f.NAME)
def test_a_family_waits_first(family: Any) -> None:
    call = next(iter(family.SHAPES.values()))
    kernels = _kernels(family.build(call, HOPPER, {}), HOPPER)
    assert kernels
    for body in kernels:
        first, second = (line.strip() for line in body.splitlines()[:2])
        assert first == "tvm_builtin_ptx_griddepcontrol_launch_dependents();"
        assert second == "tvm_builtin_ptx_griddepcontrol_wait();"
    assert "griddepcontrol" not in source(family.build(call, AMPERE, {}), AMPERE)


@pytest.mark.parametrize("family", [rms_norm, layer_norm], ids=lambda f: f.NAME)
def test_a_norm_waits_once_between_weights_and_rows(family: Any) -> None:
    call = next(iter(family.SHAPES.values()))
    (body,) = _kernels(family.build(call, HOPPER, {}), HOPPER)
    assert body.splitlines()[0].strip() == "tvm_builtin_ptx_griddepcontrol_launch_dependents();"
    before, after = body.split("tvm_builtin_ptx_griddepcontrol_wait();")
    early, late = ([line for line in part.splitlines() if "= *(uint" in line] for part in (before, after))
    assert early and not any("blockIdx" in line for line in early)
    assert any("blockIdx" in line for line in late), "a row's place depends on the block"
    assert "griddepcontrol" not in source(family.build(call, AMPERE, {}), AMPERE)


@pytest.mark.parametrize(
    ("family", "label", "weights"),
    [
        (gemv, "even_64x256", "weight_ptr"),
        (ring_gemv, "even_64x512", "weight_map"),
        (gemm_split, "small_256x576", "weight_map"),
        (gemv, "odd_19x72_f16_silu", "weight_ptr"),
        (quantized_gemv, "even_64x256_int4_g128", "codes_ptr"),
        (quantized_gemv, "gated_64x136_int8_bias", "codes_ptr"),
        (quantized_ring, "even_64x512_int8", "codes_ptr"),
    ],
    ids=lambda value: getattr(value, "NAME", value),
)
def test_weights_are_under_way_before_the_wait(family: Any, label: str, weights: str) -> None:
    """And nothing that a kernel before it writes or reads is touched: neither rows of x nor results."""
    call = family.SHAPES[label]
    config = {axis: values[0] for axis, values in family.space(call, HOPPER).items()}
    (body,) = _kernels(family.build(call, HOPPER, config), HOPPER)
    before, *after = body.split("griddepcontrol_wait();")
    assert after and weights in before
    touched = [line for line in before.splitlines() if re.search(r"\b(x_ptr|x_map|out_ptr|out_map)\b", line)]
    assert all("prefetch_tensormap" in line for line in touched)  # of the map's descriptor, which is the host's
    # The assembler may move loads that promise read-only memory (ld.global.nc) above the wait: only of what no kernel writes.
    promised = [line for line in body.splitlines() if "ld" in line and "global_nc" in line]
    assert not [line for line in promised if re.search(r"\b(x|residual)_ptr\b", line)]


@pytest.mark.parametrize("family", [*FAMILIES, gemm_split, ring_gemv, quantized_ring, append, rope], ids=lambda f: f.NAME)
def test_a_kernel_that_waits_promises_nothing_of_what_it_reads(family: Any) -> None:
    """``__restrict__`` and ``ld.global.nc`` let compiler and assembler read above the wait: only weights may be."""
    call = list(family.SHAPES.values())[-1]
    config = {axis: values[0] for axis, values in family.space(call, HOPPER).items()}
    text = source(family.build(call, HOPPER, config), HOPPER)
    kernels = [kernel[0] for kernel in KERNEL.finditer(text)]
    assert kernels and all("griddepcontrol_wait();" in kernel for kernel in kernels)
    assert "__restrict__" not in "".join(kernels)
    promised = re.findall(r"\b\w*ld_global_nc\w*\(.*", text)
    assert not [line for line in promised if re.search(r"\b(x|residual|pages|q|k|v|rows)(_ptr)?\b", line)]


def test_generated_kernels_wait_too() -> None:
    kernels = _kernels(elementwise.schedule(_sigmoid_sum(), HOPPER), HOPPER)
    assert len(kernels) == 2
    assert all(body.index("griddepcontrol_wait") < body.index("_ptr") for body in kernels)
    x = np.random.default_rng(0).random((5, 6), np.float32)
    found = run(elementwise.schedule(_sigmoid_sum(), HOPPER), HOPPER, x, np.full_like(x, np.nan))[-1]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-x)) / x.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("arch", "has"), [("sm_89", False), ("sm_90", True), ("sm_90a", True), ("sm_120a", True)])
def test_architectures(arch: str, has: bool) -> None:
    assert dependent_launch.supported(arch) == has
