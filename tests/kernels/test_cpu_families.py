"""Every CPU kernel family on all its shapes against its float64 reference, on this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.schedules.cpu import append, attend, linear, moe, rope, rope_append, topk
from llmc.schedules.cpu.norm import layer_norm, rms_norm
from tests.kernels.harness import Kernels, build, error, page_error, paged_arrays, random_arrays, run, tensor

ROWWISE = [linear, rms_norm, layer_norm, rope]
FAMILIES = [*ROWWISE, append, rope_append, attend, moe, topk]
CASES = [(family, label) for family in FAMILIES for label in family.SHAPES]


def symbol(family: Any, label: str) -> str:
    return f"{family.NAME}_{label}".replace(".", "_")


def ids(family: Any, label: str) -> str:
    return symbol(family, label)


def cases(*families: Any) -> Any:
    chosen = [(f, label) for f, label in CASES if f in families]
    return pytest.mark.parametrize(("family", "label"), chosen, ids=[ids(*c) for c in chosen])


@pytest.fixture(scope="module")
def module() -> Any:
    return Kernels({symbol(f, label): (f, f.SHAPES[label]) for f, label in CASES}, targets.parse("cpu"))


@cases(*FAMILIES)
def test_a_family_takes_its_own_shapes_and_says_why(family: Any, label: str) -> None:
    call = family.SHAPES[label]
    assert family.matches(call, targets.parse("cpu"))
    moved, flops = family.roofline(call, n=3, b=3, m=2, num_pages=4, context=10)
    assert moved > 0 and flops >= 0


@cases(*ROWWISE)
@pytest.mark.parametrize("n", [1, 3, 17, 100])
def test_rows(module: Any, family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": n}, seed=n)
    if call.attr("activation") == "relu" and n == 1:
        arrays[1] = np.abs(arrays[1]) * np.sign(arrays[0])  # the one output is not to be cut off to zero
    result = run(module, symbol(family, label), call, arrays, {"n": n})
    assert error(result, family.reference(call, *arrays)) < 2e-6


@cases(append)
@pytest.mark.parametrize("n", [1, 17])
def test_append_writes_its_slots_and_nothing_else(module: Any, family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": n, "num_pages": 9}, seed=n)
    arrays[2] = np.random.default_rng(n).permutation(9 * call.attr("page_size"))[:n].astype(np.int32)
    if n > 1:
        arrays[2][5] = -1
    tensors = [tensor(a) for a in arrays]
    module[symbol(family, label)](*tensors)
    expected = family.reference(call, *arrays)
    np.testing.assert_array_equal(tensors[3].numpy().astype(np.float32), expected.astype(np.float32))
    assert (expected != arrays[3]).any()


@cases(rope_append)
@pytest.mark.parametrize("n", [1, 17, 100])
def test_rope_append_returns_the_queries_and_writes_the_slots(module: Any, family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    symbols = {"n": n, "num_pages": 40}
    arrays = random_arrays(call, symbols, seed=n)
    arrays[3] = np.random.default_rng(n).permutation(40 * call.attr("page_size"))[:n].astype(np.int32)
    if n > 1:
        arrays[3][5] = -1
    tensors = [tensor(a) for a in (*arrays, np.full(call.result.bind(symbols), np.nan, np.float32))]
    module[symbol(family, label)](*tensors)
    queries, pages = family.reference(call, *arrays)
    assert error(tensors[-1].numpy(), queries) < 2e-6
    found, untouched = tensors[4].numpy(), pages == arrays[4]
    # A narrow dtype may round a value next to a tie either way: one unit in its last place.
    tolerance = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "uint8": 1e-3}[call.args[4].dtype]
    assert page_error(found, pages) < tolerance
    np.testing.assert_array_equal(found[untouched], arrays[4][untouched])
    assert not untouched.all()


MANY = attend.TASKS + 1  # more rows than are split, whatever the heads
ONE_ROW_EACH = [([1, 40, 70, 200], [1, 1, 1, 1]), ([257, 3, 1030, 512], [1] * 4), ([290] + [7] * (MANY - 1), [1] * MANY)]
SEVERAL_ROWS = [([5], [5]), ([70, 3, 130, 40], [50, 3, 1, 7]), ([90, 7], [80, 7]), ([530, 7, 256], [280, 7, 3])]
ATTEND_CASES = [
    (label, lengths, rows)
    for label, call in attend.SHAPES.items()
    for lengths, rows in (ONE_ROW_EACH if call.phase == "decode" else ONE_ROW_EACH + SEVERAL_ROWS)
]


@pytest.mark.parametrize(("label", "lengths", "rows"), ATTEND_CASES)
def test_attend(module: Any, label: str, lengths: list[int], rows: list[int]) -> None:
    family, call = attend, attend.SHAPES[label]
    arrays, symbols = paged_arrays(call, lengths, rows, seed=len(lengths))
    result = run(module, symbol(family, label), call, arrays, symbols)
    assert error(result, family.reference(call, *arrays)) < 2e-6


def test_attend_gives_zeros_for_an_empty_sequence(module: Any) -> None:
    call = attend.SHAPES["smollm2_decode"]
    arrays, symbols = paged_arrays(call, [20, 1], [1, 1], seed=0)
    arrays[3][1] = 0
    result = run(module, symbol(attend, "smollm2_decode"), call, arrays, symbols)
    assert np.isfinite(result[0]).all() and not result[1].any()


@cases(moe)
@pytest.mark.parametrize("n", [1, 3, 17])
def test_moe(module: Any, family: Any, label: str, n: int) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": n}, seed=n)
    rng = np.random.default_rng(n)
    experts = call.args[3].shape[0]
    arrays[1] = np.stack([rng.permutation(experts)[: call.attr("top_k")] for _ in range(n)]).astype(np.int32)
    result = run(module, symbol(family, label), call, arrays, {"n": n})
    assert error(result, family.reference(call, *arrays)) < 2e-6


def test_moe_reads_only_the_routed_experts(module: Any) -> None:
    call = moe.SHAPES["two_of_eight"]
    arrays = random_arrays(call, {"n": 3}, seed=1)
    arrays[1] = np.array([[1, 6], [6, 1], [1, 6]], np.int32)
    for weights in arrays[3:5]:
        weights[[0, 2, 3, 4, 5, 7]] = np.nan
    assert np.isfinite(run(module, symbol(moe, "two_of_eight"), call, arrays, {"n": 3})).all()


@cases(topk)
def test_topk_takes_the_first_of_equals(module: Any, family: Any, label: str) -> None:
    call = family.SHAPES[label]
    (x,) = random_arrays(call, {"n": 4}, seed=4)
    x[1], x[2], x[3, ::2] = np.round(x[1]), x[2, 0], -np.inf
    ids = tensor(np.full(call.result.bind({"n": 4}), -1, np.int32))
    module[symbol(family, label)](tensor(x), ids)
    np.testing.assert_array_equal(ids.numpy(), family.reference(call, x))


@cases(*ROWWISE)
def test_a_row_has_the_same_bits_in_every_batch(module: Any, family: Any, label: str) -> None:
    call = family.SHAPES[label]
    arrays = random_arrays(call, {"n": 17}, seed=3)
    rows = [i for i, spec in enumerate(call.args) if spec.shape[0] == "n"]
    together = run(module, symbol(family, label), call, arrays, {"n": 17})
    for r in (0, 1, 7, 16):
        alone = [a[r : r + 1] if i in rows else a for i, a in enumerate(arrays)]
        np.testing.assert_array_equal(run(module, symbol(family, label), call, alone, {"n": 1})[0], together[r])


@pytest.mark.parametrize(
    ("decode", "extend"),
    [("smollm2_decode", "smollm2_extend"), ("window_decode", "window_96_bf16"), ("wide_window_decode", "wide_window_sinks")],
)
@pytest.mark.parametrize(("lengths", "rows"), [([70, 3, 130, 40], [50, 3, 1, 7]), ([530, 3, 1030, 300], [20, 3, 9, 50])])
def test_attention_has_the_same_bits_in_every_batch_and_phase(
    module: Any, decode: str, extend: str, lengths: list[int], rows: list[int]
) -> None:
    call = attend.SHAPES[extend]
    arrays, symbols = paged_arrays(call, lengths, rows, seed=5)
    together = run(module, symbol(attend, extend), call, arrays, symbols)
    first = 0
    for s, count in enumerate(rows):
        for r in range(count):
            q = arrays[0][first + r : first + r + 1]
            one = [q, arrays[1], arrays[2][s : s + 1], np.array([lengths[s] - count + r + 1], np.int32), np.array([0, 1], np.int32)]
            one += arrays[5:]  # sinks
            bound = {**symbols, "n": 1, "b": 1, "b+1": 2}
            for name in (decode, extend):
                alone = run(module, symbol(attend, name), attend.SHAPES[name], one, bound)
                np.testing.assert_array_equal(alone[0], together[first + r])
        first += count


def test_moe_has_the_same_bits_in_every_batch(module: Any) -> None:
    call = moe.SHAPES["odd_57_19"]
    arrays = random_arrays(call, {"n": 17}, seed=3)
    arrays[1] = np.random.default_rng(0).integers(0, 5, (17, 3)).astype(np.int32)
    together = run(module, symbol(moe, "odd_57_19"), call, arrays, {"n": 17})
    for r in (0, 9, 16):
        alone = [a[r : r + 1] if i < 3 else a for i, a in enumerate(arrays)]
        np.testing.assert_array_equal(run(module, symbol(moe, "odd_57_19"), call, alone, {"n": 1})[0], together[r])


@pytest.mark.parametrize("label", ["odd_37x100_f16_silu", "long_k_11x2077"])
def test_linear_has_the_same_bits_in_every_configuration(module: Any, label: str) -> None:
    call, cpu = linear.SHAPES[label], targets.parse("cpu")
    space = linear.space(call, cpu)
    default = {axis: values[0] for axis, values in space.items()}
    changes = [{"row_block": 1}, {"row_block": 7}, {"row_block": 193}, {"k_block": space["k_block"][-1]}, {"k_block": 1536}]
    changes += [{"tile": tile} for tile in space["tile"][1:]]
    other = build(
        {f"c{i}": (linear, call) for i in range(len(changes))}, cpu, {f"c{i}": default | c for i, c in enumerate(changes)}
    )
    arrays = random_arrays(call, {"n": 40}, seed=8)
    expected = run(module, symbol(linear, label), call, arrays, {"n": 40})
    for i, change in enumerate(changes):
        np.testing.assert_array_equal(run(other, f"c{i}", call, arrays, {"n": 40}), expected, err_msg=str(change))


@pytest.mark.parametrize("label", ["smollm2_decode", "window_96_bf16"])
def test_attention_has_the_same_bits_in_every_configuration(module: Any, label: str) -> None:
    call, cpu = attend.SHAPES[label], targets.parse("cpu")
    blocks, queries = attend.space(call, cpu)["row_block"], attend.space(call, cpu)["queries"]
    configs = [{"row_block": blocks[0], "queries": q} for q in queries[1:]]
    configs += [{"row_block": block, "queries": queries[0]} for block in blocks[1:2]]
    other = build({f"c{i}": (attend, call) for i in range(len(configs))}, cpu, {f"c{i}": c for i, c in enumerate(configs)})
    rows = [1, 1, 1] if call.phase == "decode" else [50, 3, 7]
    arrays, symbols = paged_arrays(call, [70, 3, 130], rows, seed=5)
    expected = run(module, symbol(attend, label), call, arrays, symbols)
    for i, config in enumerate(configs):
        np.testing.assert_array_equal(run(other, f"c{i}", call, arrays, symbols), expected, err_msg=str(config))
