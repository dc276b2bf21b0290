"""Products by AMX's tile registers, emulated instruction by instruction where the processor has none."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.cpu import linear, linear_tiles, quantized_linear, tiles
from llmc.schedules.protocol import KernelCall, TensorSpec
from tests.kernels.harness import Kernels, build, error, random_arrays, run
from tests.kernels.test_cpu_quantized import arrays_of
from tests.support import amx

SPECS = {"avx2": "cpu:x86-64-v3+amx-bf16+amx-int8", "avx512_vnni": "cpu:x86-64-v4+avx512vnni+amx-bf16+amx-int8"}
"""What stands beside the tiles: the emulator needs the rest to be there."""
QUANTIZED = (
    "odd_19x100_int4z_g32_silu", "odd_37x200_int4_g128", "zero_points_24x128_int8p_g32", "six_bits_16x80_int6_g16_f32",
    "q4_k_40x512",
)  # fmt: skip
CALL = linear_tiles.SHAPES["square_576"]
ROWS = (1, 17, 37, 46, 81)
"""Too few for tiles of bytes, five and a short tile behind two, and a second row block that has two."""


@pytest.fixture(params=list(SPECS.values()), ids=list(SPECS))
def spec(request: pytest.FixtureRequest) -> str:
    target = targets.parse(request.param)
    if missing := amx.lacking(target):
        pytest.skip(f"this machine cannot run {target.name}, tiles aside: it lacks {missing}")
    amx.use(target)
    return str(request.param)


@cache
def kernels(spec: str) -> Any:
    """Kernels by their labels; of bfloat16 weights ``bf16_``, with a row block that is not all rows."""
    chosen = {label: (quantized_linear, quantized_linear.SHAPES[label]) for label in QUANTIZED}
    chosen |= {f"bf16_{label}": (linear_tiles, call) for label, call in linear_tiles.SHAPES.items()}
    blocks = {label: {"row_block": 48, "rows": 4} if label in QUANTIZED else {"row_block": 64} for label in chosen}
    return Kernels(chosen, targets.parse(spec), blocks)


@cache
def without_tiles(spec: str) -> Any:
    """The quantized kernels of the same target without them."""
    target = targets.parse(spec.replace("+amx-bf16+amx-int8", ""))
    return Kernels({label: (quantized_linear, quantized_linear.SHAPES[label]) for label in QUANTIZED}, target)


@pytest.mark.parametrize("label", QUANTIZED)
@pytest.mark.parametrize("n", ROWS)
def test_quantized_products_have_the_bits_that_they_have_without_tiles(spec: str, label: str, n: int) -> None:
    call = quantized_linear.SHAPES[label]
    arrays = arrays_of(call, n, seed=n, exact=False)
    result = run(kernels(spec), label, call, arrays, {"n": n})
    np.testing.assert_array_equal(result, run(without_tiles(spec), label, call, arrays, {"n": n}))


@pytest.mark.parametrize("label", QUANTIZED)
def test_quantized_products_of_exact_activations_are_exact_to_float32(spec: str, label: str) -> None:
    call = quantized_linear.SHAPES[label]
    arrays = arrays_of(call, 46, seed=2, exact=True)
    result = run(kernels(spec), label, call, arrays, {"n": 46})
    assert error(result, quantized_linear.reference(call, *arrays)) < 2e-6


@pytest.mark.parametrize("label", list(linear_tiles.SHAPES))
@pytest.mark.parametrize("n", ROWS)
def test_bfloat16_weights(spec: str, label: str, n: int) -> None:
    call = linear_tiles.SHAPES[label]
    arrays = random_arrays(call, {"n": n}, seed=n)
    assert error(run(kernels(spec), f"bf16_{label}", call, arrays, {"n": n}), linear.reference(call, *arrays)) < 2e-6


@pytest.mark.parametrize("label", list(linear_tiles.SHAPES))
def test_a_row_has_the_same_bits_in_every_batch(spec: str, label: str) -> None:
    call = linear_tiles.SHAPES[label]
    arrays = random_arrays(call, {"n": 37}, seed=3)
    rows = [i for i, s in enumerate(call.args) if s.shape[0] == "n"]
    together = run(kernels(spec), f"bf16_{label}", call, arrays, {"n": 37})
    for r in (0, 15, 16, 36):
        alone = [a[r : r + 1] if i in rows else a for i, a in enumerate(arrays)]
        np.testing.assert_array_equal(run(kernels(spec), f"bf16_{label}", call, alone, {"n": 1})[0], together[r])


def test_three_parts_are_all_of_a_float(spec: str) -> None:
    """Weights that pick one column give x itself, all 24 bits and both signs, from about 2^-90 to 2^120."""
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((19, 576)) * np.exp2(rng.integers(-90, 120, (19, 576)))).astype(np.float32)
    weight = random_arrays(CALL, {"n": 1}, seed=0)[1]
    columns = rng.permutation(576)
    weight[:] = np.eye(576, dtype=np.float32)[columns]
    np.testing.assert_array_equal(run(kernels(spec), "bf16_square_576", CALL, [x, weight], {"n": 19}), x[:, columns])


def test_every_thread_gives_its_tiles_back(spec: str) -> None:
    if not amx.FEATURES.isdisjoint(amx.host().features or ()):
        pytest.skip("counts what the emulator runs, and this machine has tile instructions")
    before = amx.counts()
    quantized = quantized_linear.SHAPES["odd_37x200_int4_g128"]
    run(kernels(spec), "odd_37x200_int4_g128", quantized, arrays_of(quantized, 50, 1, exact=False), {"n": 50})
    run(kernels(spec), "bf16_square_576", CALL, random_arrays(CALL, {"n": 50}, 1), {"n": 50})
    after = amx.counts()
    made = {kind: after[kind] - before[kind] for kind in after}
    # 3 tiles of rows, 3 panels, 8 blocks, once for each vector of a panel; 4 tiles of rows, 36 of outputs, 18 steps, 3 parts.
    vectors = 16 // targets.parse(spec).lanes()
    assert (made["byte products"], made["bfloat16 products"]) == (3 * 3 * 8 * vectors, 4 * 36 * 18 * 3)
    assert made["configurations"] == made["releases"] > 0


def test_what_has_tiles_and_what_has_none() -> None:
    target = targets.parse("cpu:sapphirerapids")
    small, decode, half = (linear._call(o, k, d, phase=p) for o, k, d, p in (
        (31, 64, "bfloat16", "extend"), (64, 64, "bfloat16", "decode"), (64, 64, "float16", "extend"),
    ))  # fmt: skip
    assert "AMX tiles" in str(linear_tiles.matches(CALL, target))
    assert [linear_tiles.matches(c, target) for c in (small, decode, half)] == [None] * 3
    assert linear_tiles.matches(linear._call(64, 48, "bfloat16"), target) is None
    logits = replace(CALL, args=(TensorSpec(("r", 576), "float32"), *CALL.args[1:]), result=TensorSpec(("r", 576), "float32"))
    assert linear_tiles.matches(logits, target) is None
    quantized = quantized_linear.SHAPES["square_256_int4_g64"]
    assert "AMX tiles, vnni" in str(quantized_linear.matches(quantized, target))
    assert "AMX" not in str(quantized_linear.matches(replace(quantized, phase="decode"), target))
    for spec in ("cpu:sapphirerapids@windows", "cpu:sapphirerapids+noamx-bf16+noamx-int8", "cpu:cascadelake"):
        other = targets.parse(spec)
        assert linear_tiles.matches(CALL, other) is None and "AMX" not in str(quantized_linear.matches(quantized, other))


@pytest.mark.parametrize(
    ("family", "call", "wanted"),
    [
        (quantized_linear, quantized_linear.SHAPES["square_256_int4_g64"], "tdpbssd"),
        (quantized_linear, quantized_linear.SHAPES["q5_1_16x64"], "tdpbsud"),
        (linear_tiles, linear_tiles.SHAPES["one_step_32x32_silu"], "tdpbf16ps"),
    ],
    ids=["signed", "unsigned", "bfloat16"],
)
def test_code_for_sapphire_rapids(family: Any, call: KernelCall, wanted: str) -> None:
    """The instructions are there, and sums of 16 rows stay in vector registers between them."""
    assembly = build({"one": (family, call)}, targets.parse("cpu:sapphirerapids")).inspect_source("asm")
    found = set(re.findall(r"\btdp\w+", assembly))
    assert found == {wanted} and "ldtilecfg" in assembly and "tilerelease" in assembly
    if family is quantized_linear:
        assert len(re.findall(r"vcvtdq2ps\s+-?\d*\(%r\w+.*?\), %zmm", assembly)) >= tiles.ROWS
