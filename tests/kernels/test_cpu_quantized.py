"""Quantized weights on a CPU: layout, integer kernels for every instruction set that this machine has, and batch invariance."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, scheme, stored
from llmc.schedules.cpu import layout_panel, quantized_linear, quantized_rows, quantized_take
from llmc.schedules.protocol import KernelCall
from tests.kernels.harness import Kernels, build, error, run

LEVELS = {
    "x86-64": "cpu:x86-64",
    "avx2": "cpu:x86-64-v3",
    "avx_vnni": "cpu:x86-64-v3+avxvnni",
    "avx512": "cpu:skylake-avx512",
    "avx512_vnni": "cpu:cascadelake",
    "host": "cpu",
}
SCHEMES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "int8", "int2_g32", "int3_g64", "int4_g128",
    "int4p_g32", "int6_g16", "int7_g32", "int4z_g64_bf16",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
)  # fmt: skip
FIELDS = ("codes", "scales", "zeros", "minima", "super_scales", "super_minima")
SMALL = (
    "odd_19x100_int4z_g32_silu", "odd_33x70_int8", "q5_0_40x96", "six_bits_16x80_int6_g16_f32", "zero_points_24x128_int8p_g32",
    "q2_k_17x256", "q3_k_35x512", "q4_k_40x512", "q6_k_33x512",
)  # fmt: skip


def quantized(name: str, o: int, k: int, seed: int = 0) -> QuantizedTensor:
    """A random matrix of the scheme: every code, scales of both signs, all zero points."""
    how, rng = scheme(name), np.random.default_rng(seed)
    codes = rng.integers(0, 1 << how.bits, (o, k)).astype(np.uint8)
    groups = (o, how.groups(k))
    if how.super_group:
        return two_level(how, codes, groups, rng)
    scales = stored((rng.uniform(0.5, 1.5, groups) * rng.choice([-0.01, 0.01], groups)).astype(np.float32), how.scale_dtype)
    zeros = rng.integers(0, 1 << how.bits, groups).astype(np.uint8) if how.offset == "zero_point" else None
    minima = stored(rng.normal(0, 0.1, groups).astype(np.float32), how.scale_dtype) if how.offset == "minimum" else None
    return QuantizedTensor(how, codes, scales, zeros, minima)


def two_level(how: Scheme, codes: np.ndarray, groups: tuple[int, int], rng: np.random.Generator) -> QuantizedTensor:
    """Every integer that the scheme's scales and minima can be, and float16 factors."""
    signed, top = how.offset == "none", 1 << how.sub_bits
    scales = (rng.integers(0, top, groups) - (top // 2 if signed else 0)).astype(np.int8)
    factors = (groups[0], -(-codes.shape[1] // how.super_group))
    found = QuantizedTensor(how, codes, scales, super_scales=rng.uniform(1e-4, 1e-3, factors).astype(np.float16))
    if not signed:
        found.minima = rng.integers(0, top, groups).astype(np.int8)
        found.super_minima = rng.uniform(1e-4, 1e-3, factors).astype(np.float16)
    return found


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return b is None if a is None else b is not None and a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("o", "k"), [(16, 128), (19, 100), (1, 3), (33, 257)])
def test_unpack_is_the_inverse_of_pack(name: str, o: int, k: int) -> None:
    k = k if not scheme(name).super_group else k // 256 * 256 + 256
    matrix = quantized(name, o, k)
    assert layout_panel.takes(matrix.scheme, o, k, targets.parse("cpu")) is None
    parts = layout_panel.pack(matrix)
    specs = layout_panel.parts(matrix.scheme, o, k)
    assert {n: (a.shape, str(a.dtype)) for n, a in parts.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}
    back = layout_panel.unpack(parts, matrix.scheme, o, k)
    assert all(same(getattr(matrix, n), getattr(back, n)) for n in FIELDS)
    if matrix.scheme.super_group and o % 16 == 0:  # as many bytes as the file's blocks
        assert 8 * parts["panels"].size == o * k * matrix.scheme.bits_per_weight(k)


def test_a_panel_is_four_bits_and_its_scales() -> None:
    """What the layout's docstring says, byte by byte, for one code."""
    matrix = quantized("q4_1", 20, 64)
    matrix.codes[:] = 0
    matrix.codes[17, 32 + 4 * 5 + 3] = 9  # panel 1, row 1, block 1, quad 5 is vector 2's upper half, column 3 of it
    panels = layout_panel.pack(matrix)["panels"]
    record = panels[1, 320:]
    assert record[2 * 64 + 4 * 1 + 3] == 9 << 4 and record[:256].sum() == 9 << 4
    np.testing.assert_array_equal(record[256:288].view(np.float16)[:4], matrix.scales[16:, 1])
    np.testing.assert_array_equal(record[288:320].view(np.float16)[:4], matrix.minima[16:, 1])  # type: ignore[index]


def test_what_the_layout_does_not_take_has_a_reason() -> None:
    cpu, cuda = targets.parse("cpu"), targets.parse("cuda:sm_80")
    assert "not for" in str(layout_panel.takes(scheme("int4_g32"), 16, 64, cuda))
    assert "integer codes" in str(layout_panel.takes(scheme("nf4_g64"), 16, 64, cpu))


@cache
def kernels(spec: str) -> Any:
    """Kernels for one instruction set; all shapes on the host's own, a few on the others."""
    labels = quantized_linear.SHAPES if spec == "cpu" else SMALL
    return Kernels({label: (quantized_linear, quantized_linear.SHAPES[label]) for label in labels}, targets.parse(spec))


def arrays_of(call: KernelCall, n: int, seed: int, exact: bool) -> list[np.ndarray]:
    """Operands of a call; ``exact``: activations that int8 holds, with the largest code in every block."""
    rng = np.random.default_rng(seed)
    o, k = call.attr("o"), call.attr("k")
    x = rng.standard_normal((n, k)).astype(np.float32)
    if exact:
        x = rng.integers(-127, 128, (n, k)).astype(np.float32)
        x[:, ::32] = 127
        x *= np.float32(0.03125)
    more = [rng.standard_normal(s.bind({"n": n})).astype(np.float32) for s in call.args[2:]]
    return [x, layout_panel.pack(quantized(call.attr("scheme"), o, k, seed))["panels"], *more]


@pytest.mark.parametrize("spec", list(LEVELS.values()), ids=list(LEVELS))
@pytest.mark.parametrize("n", [1, 3, 17, 50])
def test_products_of_exact_activations_are_exact_to_float32(spec: str, n: int) -> None:
    target, host = targets.parse(spec), targets.parse("cpu")
    if not set(target.features) <= set(host.features):
        pytest.skip(f"this machine cannot run {target.name}: it lacks {set(target.features) - set(host.features)}")
    for label in quantized_linear.SHAPES if spec == "cpu" else SMALL:
        call = quantized_linear.SHAPES[label]
        arrays = arrays_of(call, n, seed=n, exact=True)
        if call.attr("activation").startswith("relu") and call.attr("o") == 1:
            arrays[0] *= np.sign(quantized_linear.reference(_plain(call), *arrays))  # the one output is not to be cut to zero
        result = run(kernels(spec), label, call, arrays, {"n": n})
        assert error(result, quantized_linear.reference(call, *arrays)) < 2e-6, label


def _plain(call: KernelCall) -> KernelCall:
    attrs = tuple((name, "none" if name == "activation" else value) for name, value in call.attrs)
    return KernelCall(call.op, call.args, call.result, attrs, call.phase)


@pytest.fixture(scope="module")
def module() -> Any:
    return kernels("cpu")


@pytest.mark.parametrize("label", [name for name, c in quantized_linear.SHAPES.items() if c.attr("activation") == "none"])
@pytest.mark.parametrize("n", [1, 37])
def test_rounding_of_activations_is_the_only_error(module: Any, label: str, n: int) -> None:
    """Half a step of every activation, times its weight, is the most a product may be off; the rounded one is met closely."""
    call = quantized_linear.SHAPES[label]
    arrays = arrays_of(call, n, seed=n, exact=False)
    result = run(module, label, call, arrays, {"n": n}).astype(np.float64)
    expected = quantized_linear.reference(call, *arrays)
    x, k = arrays[0].astype(np.float64), call.attr("k")
    weight = layout_panel.unpack({"panels": arrays[1]}, scheme(call.attr("scheme")), call.attr("o"), k).dequantize()
    largest = np.repeat(np.maximum.reduceat(np.abs(x), np.arange(0, k, 32), axis=1), 32, axis=1)[:, :k]
    bound = (largest / 127 * 0.5001) @ np.abs(weight.astype(np.float64)).T
    assert (np.abs(result - expected) <= bound + 1e-6 * np.abs(expected).max()).all()
    assert error(result, quantized_linear.reference(call, quantized_rows.reference(arrays[0]), *arrays[1:])) < 1e-3


@pytest.mark.parametrize("label", list(quantized_linear.SHAPES))
def test_a_row_has_the_same_bits_in_every_batch(module: Any, label: str) -> None:
    call = quantized_linear.SHAPES[label]
    arrays = arrays_of(call, 29, seed=3, exact=False)
    rows = [i for i, spec in enumerate(call.args) if spec.shape[0] == "n"]
    together = run(module, label, call, arrays, {"n": 29})
    for r in (0, 1, 12, 26, 28):
        alone = [a[r : r + 1] if i in rows else a for i, a in enumerate(arrays)]
        np.testing.assert_array_equal(run(module, label, call, alone, {"n": 1})[0], together[r])


@pytest.mark.parametrize("label", ["odd_19x100_int4z_g32_silu", "q5_1_16x64", "zero_points_24x128_int8p_g32"])
@pytest.mark.parametrize("config", [{"rows": 4, "row_block": 8}, {"rows": 16, "row_block": 48, "turn": 8}, {"rows": 3, "turn": 4}])
def test_the_tile_does_not_change_the_bits(module: Any, config: dict[str, int], label: str) -> None:
    call = quantized_linear.SHAPES[label]
    arrays = arrays_of(call, 40, seed=8, exact=False)
    other = build({"other": (quantized_linear, call)}, targets.parse("cpu"), {"other": config})
    np.testing.assert_array_equal(run(other, "other", call, arrays, {"n": 40}), run(module, label, call, arrays, {"n": 40}))


@pytest.mark.parametrize("n", [1, 24, 61])
def test_panels_in_turns_are_the_same_bits(n: int) -> None:
    """Groups of two of six panels, over row blocks of which the last is short."""
    call = quantized_linear._call(96, 64, "q4_1")
    arrays = arrays_of(call, n, seed=n, exact=False)
    configs = {f"panels_{panels}": {"row_block": 24, "panels": panels} for panels in (2, 6)}
    both = build(dict.fromkeys(configs, (quantized_linear, call)), targets.parse("cpu"), configs)
    in_turns, together = (run(both, name, call, arrays, {"n": n}) for name in configs)
    np.testing.assert_array_equal(in_turns, together)


def test_rows_of_zeros_and_of_large_values_stay_finite(module: Any) -> None:
    label = "qkv_960x576_q4_1"
    call = quantized_linear.SHAPES[label]
    arrays = arrays_of(call, 3, seed=1, exact=False)
    arrays[0][0], arrays[0][1, :32], arrays[0][2] = 0, 1e-38, 1e30
    result = run(module, label, call, arrays, {"n": 3})
    assert not result[0].any() and np.isfinite(result).all()


@pytest.mark.parametrize("label", list(quantized_take.SHAPES))
def test_take_gives_the_dequantized_rows(label: str) -> None:
    call = quantized_take.SHAPES[label]
    o, k = call.attr("o"), call.attr("k")
    panels = layout_panel.pack(quantized(call.attr("scheme"), o, k))["panels"]
    ids = np.random.default_rng(1).permutation(o).astype(np.int32)
    result = run(build({"take": (quantized_take, call)}, targets.parse("cpu")), "take", call, [ids, panels], {"n": o})
    assert error(result, quantized_take.reference(call, ids, panels)) < 1e-6


@pytest.mark.parametrize(
    ("spec", "instruction"),
    [
        ("cpu:aarch64+neon", "mla"),
        ("cpu:aarch64+dotprod", "sdot"),
        ("cpu:aarch64+dotprod+i8mm", "smmla"),
        ("cpu:x86-64-v3", "vpsignb"),
        ("cpu:x86-64-v3+avxvnni", "vpdpbusd"),
        ("cpu:x86-64-v4+avx512vnni", "vpdpbusd"),
    ],
)
def test_every_instruction_set_has_its_dot_product(spec: str, instruction: str) -> None:
    """Eight bits, where the ways differ."""
    module = build({"linear": (quantized_linear, quantized_linear.SHAPES["odd_33x70_int8"])}, targets.parse(spec))
    assembly = module.inspect_source("asm")
    found = {name for name in ("mla", "sdot", "smmla", "vpsignb", "vpdpbusd") if re.search(rf"\b{name}\b", assembly)}
    # A single row takes sdot where pairs of rows take smmla.
    assert found - {"mla"} == {instruction, *(["sdot"] if instruction == "smmla" else [])} - {"mla"} and instruction in found
    assert ("{vex}" in assembly) == ("avxvnni" in spec)


@pytest.mark.parametrize("spec", ["cpu:x86-64-v3", "cpu:aarch64+dotprod"])
def test_weights_of_few_bits_are_asked_for_before_they_are_needed(spec: str) -> None:
    module = build({"linear": (quantized_linear, quantized_linear.SHAPES["qkv_960x576_q4_1"])}, targets.parse(spec))
    assert re.search(r"\bprefetch|\bprfm", module.inspect_source("asm"))
