"""Sensitivity against one run per matrix, the allocation against trying everything, and a model of a given number of bits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.dialect import interpreter
from llmc.errors import UsageError
from llmc.passes.quantize.budget import CANDIDATES, Choice, allocate, hull
from llmc.passes.quantize.options import QuantOptions
from llmc.passes.quantize.report import bits_per_weight, rows
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import scheme
from llmc.passes.quantize.sensitivity import PROBE, measure
from tests.quantize.test_calibrate import WIDE, prepared, stored, tokens
from tests.support import graphs

TIED = replace(WIDE, tied=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("config", [WIDE, TIED], ids=["untied", "tied"])
def test_divergence_is_that_of_a_model_with_the_unit_rounded(config: graphs.Config) -> None:
    built, graph = prepared(config)
    names = {p.name for p in built.table.values() if len(p.shape) == 2}
    text = tokens(config)[0, :13]
    schemes = [scheme("int3z_g64"), scheme("int8_g64")]
    units = measure(graph, built.table, names, schemes, text, lambda *_: None)
    assert sorted(p.name for unit in units for p in unit.params) == sorted(names)
    together = [sorted(p.name.split(".")[-2:][0] for p in unit.params) for unit in units]
    assert ["k_proj", "q_proj", "v_proj"] in together and ["gate_proj", "up_proj"] in together and ["down_proj"] in together
    given = {"input_ids": text, "positions": np.arange(len(text))}

    def run(changed: dict[str, np.ndarray]) -> np.ndarray:
        return log_softmax(interpreter.run(graph.module(), built.arguments(graph.params, {**given, **changed})))

    exact = run({})
    for unit in units[:4] + units[-2:]:
        changed = {p.name: quantize(p.source.read(), scheme(PROBE), clippings=(1.0,)).dequantize() for p in unit.params}
        p, q = exact, run(changed)
        assert unit.divergence == pytest.approx(float((np.exp(p) * (p - q)).sum(axis=1).mean()), rel=0.02, abs=1e-6)
        assert unit.errors["int3z_g64"] > 2 > 1 > 0.1 > unit.errors["int8_g64"]


def random_choices(seed: int) -> list[list[Choice]]:
    rng = np.random.default_rng(seed)
    schemes = [scheme(name) for name in CANDIDATES[:4]]
    sizes, harm = rng.integers(10, 100, 5), np.exp(2 * rng.standard_normal(5))
    return [
        [(float(size * how.bits), float(h * 4.0**-how.bits * rng.uniform(0.7, 1.4)), how) for how in schemes]
        for size, h in zip(sizes, harm, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_allocation_loses_no_more_than_its_last_step(seed: int) -> None:
    """It is at least as good as the best there is for a budget that is smaller by the largest step, found by trying everything."""
    choices = random_choices(seed)
    least, most = (sum(pick(c[0] for c in unit) for unit in choices) for pick in (min, max))
    hulls = [hull(unit) for unit in choices]
    step = max(b[0] - a[0] for h in hulls for a, b in itertools.pairwise(h))
    for budget in np.linspace(least, most, 6):
        chosen = allocate(choices, float(budget))
        taken = [next(c for c in unit if c[2] is how) for unit, how in zip(choices, chosen, strict=True)]
        assert sum(c[0] for c in taken) <= budget
        fitting = [p for p in itertools.product(*choices) if sum(c[0] for c in p) <= budget - step]
        best = min((sum(c[1] for c in p) for p in fitting), default=np.inf)
        assert sum(c[1] for c in taken) <= best * (1 + 1e-9)
    with pytest.raises(ValueError, match="the least"):
        allocate(choices, least - 1)


def test_the_hull_leaves_out_what_is_never_best() -> None:
    how = scheme("int4_g32")
    assert [c[0] for c in hull([(4, 1.0, how), (1, 8.0, how), (2, 7.9, how), (3, 2.0, how), (5, 1.5, how)])] == [1, 3, 4]


def test_a_model_comes_to_the_bits_that_were_asked(tmp_path: Path) -> None:
    kept = stored(WIDE, QuantOptions(target_bpw=7.0, method="gptq", keep=("k_proj=int4_g32",)), tmp_path)
    assert 6.0 < bits_per_weight(rows(kept)) <= 7.0
    found = {r.name: r.scheme for r in kept if len(r.shape) == 2}
    assert found["layers.0.attn.k_proj.weight"] == "int4_g32"
    assert len(set(found.values()) & set(CANDIDATES)) > 1
    assert any(r.reason == "gptq" for r in kept)


def test_budgets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--target-bpw 1.5 is less than the \d+\.\d\d bits per weight"):
        stored(WIDE, QuantOptions(target_bpw=1.5), tmp_path)
    with pytest.raises(UsageError, match="give one"):
        QuantOptions("int4", target_bpw=4.5)
    with pytest.raises(UsageError, match="--target-bpw 40 cannot be"):
        QuantOptions(target_bpw=40)
