"""Quantized models end to end through the compiler and the VM, against the interpreter on the dequantized weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc import targets
from llmc.dialect import interpreter
from llmc.errors import UsageError
from llmc.importer.params import DTYPES, Constant, Param, ParamTable
from llmc.passes.paged_attention import paged_attention
from llmc.passes.phases import phases
from llmc.passes.pipeline import Lowered, lower
from llmc.passes.quantize.options import QuantOptions
from llmc.passes.quantize.plan import Plan, assign
from llmc.passes.quantize.quantize_weights import quantize_weights
from llmc.passes.quantize.report import Stored, bits_per_weight, rows, table
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import scheme
from llmc.passes.rewrite import op_name
from tests.passes.test_end_to_end import OPTIONS, TARGET, Machine
from tests.passes.test_graph_passes import optimised
from tests.support import graphs
from tests.support.stepper import Stepper, mixed_schedule


def slow(*values: str) -> Any:
    """A model and a scheme that default tests have, each with another."""
    return pytest.param(*values, marks=pytest.mark.slow)


def options(quant: str | None, *keep: str) -> QuantOptions:
    return QuantOptions(quant, keep)


def compiled(case: str, quantization: QuantOptions) -> tuple[graphs.Built, Lowered]:
    built = graphs.build(graphs.CASES[case])
    return built, lower(built.module, built.table, TARGET, replace(OPTIONS, quantization=quantization))


def by_name(lowered: Lowered) -> dict[str, Stored]:
    return {record.name: record for record in lowered.stored}


def dequantized(case: str, chosen: dict[str, str]) -> graphs.Built:
    """The same model with the matrices of ``chosen`` (name -> scheme) rounded to their scheme, in float32."""
    built = graphs.build(graphs.CASES[case])
    held = {}
    for name, kind in chosen.items():
        stored = graphs.stored(built.table, name)
        held[name] = quantize(stored.reshape(-1, stored.shape[-1]), scheme(kind)).dequantize().reshape(stored.shape)
    params = [
        Param(p.name, Constant(held.get(p.name, graphs.stored(built.table, p.name)), p.name), p.dtype) for p in built.table.values()
    ]
    for param in params:
        if param.name in held:
            param.dtype = "float32"
    built.table = ParamTable(params)
    return built


def error(case: str, quantization: QuantOptions, chosen: dict[str, str]) -> tuple[float, Lowered]:
    """The relative error of all logits (Frobenius), and what was lowered."""
    built, lowered = compiled(case, quantization)
    reference = dequantized(case, chosen)
    sequences = [np.random.default_rng(5).integers(0, built.config.vocab, n) for n in (11, 7, 5)]
    stepper = Stepper(Machine(built, lowered, OPTIONS.kv_dtype), sequences, OPTIONS.page_size, 12)
    mixed_schedule(stepper)
    params = reference.module["main"].params
    found, expected = [], []
    for ids, logits in zip(sequences, stepper.logits, strict=True):
        given = {"input_ids": ids, "positions": np.arange(len(ids))}
        values = interpreter.run(reference.module, reference.arguments(params, given))
        found += list(logits.values())
        expected += [values[position] for position in logits]
    difference = np.asarray(found, np.float64) - np.asarray(expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected)), lowered


def matrices(case: str) -> list[str]:
    built = graphs.build(graphs.CASES[case])
    return [p.name for p in built.table.values() if len(p.shape) > 1 and "router" not in p.name]


@pytest.mark.parametrize(
    ("case", "name"),
    [("grouped", "fp8_e4m3"), ("parallel_partial", "nf4"), ("experts", "mxfp4"), slow("nhd", "mxfp4"), slow("single", "fp8_e4m3")],
)
def test_logits_are_those_of_the_dequantized_weights(case: str, name: str) -> None:
    """Schemes whose kernels keep float activations: nothing but the order of additions differs."""
    full = scheme(name).name
    keep = [f"^{m}$={full}" for m in ("embed", "lm_head.weight")]  # not int8, which may come with rounded activations
    worst, lowered = error(case, options(name, *keep), dict.fromkeys(matrices(case), full))
    assert worst < 1e-5
    assert all(r.scheme == full and not r.reason for r in lowered.stored if len(r.shape) > 1 and "router" not in r.name)


@pytest.mark.parametrize(
    ("case", "name"),
    [("nhd", "int4z_g64"), ("parallel_partial", "int4p_g32"), ("grouped", "int8"), ("experts", "int4"), slow("grouped", "int4")],
)
def test_integer_schemes_with_rounded_activations(case: str, name: str) -> None:
    """What rounding activations to 8 bits costs, on a model of random weights: about a percent."""
    full = {"int8": "int8_g32"}.get(name, scheme(name).name)  # finer on a CPU
    outer = full if name == "int8" else "int8"
    chosen = {m: outer if m in ("embed", "lm_head.weight") else full for m in matrices(case)}
    worst, _ = error(case, options(name), chosen)
    assert worst < 3e-2


def test_a_tied_embedding_is_stored_once() -> None:
    _, lowered = compiled("nhd", options("int4"))
    record = by_name(lowered)["embed"]
    assert record.scheme == "int8"
    parts = [w for w in lowered.weights if w.startswith("embed.")]
    assert parts and len(parts) == len(set(parts))
    ops = {k.op for k in lowered.kernels}
    assert {"llmc.quantized_take", "llmc.quantized_linear"} <= ops and "llmc.linear" not in ops


@pytest.mark.parametrize(("case", "op"), [("grouped", "llmc.quantized_linear"), ("experts", "llmc.quantized_moe")])
def test_extend_computes_only_wanted_rows_after_the_last_attention(case: str, op: str) -> None:
    built, plan = graphs.build(graphs.CASES[case]), Plan(options("int4"))
    graph = optimised(built)
    assign(graph, built.table, plan, TARGET)
    quantize_weights(graph, built.table, plan, TARGET)
    paged_attention(graph, 4, "float32")
    extend = {g.name: g for g in phases(graph)}["extend"]
    rows = [str(v.ty.shape[0]) for v, e in extend.bindings if op_name(e) == op]
    # as without quantization: layer 0, then of layer 1 all that follows attention, and the vocabulary
    assert rows == (["n"] * 5 + ["r"] * 4 if case == "grouped" else ["n", "r"])


def test_keep_names_exceptions_and_splits_what_would_merge() -> None:
    _, lowered = compiled("grouped", options("int4", "lm_head=int8_g32", r"layers\.0\..*v_proj=none", "embed_tokens=none"))
    found = by_name(lowered)
    assert found["lm_head.weight"].scheme == "int8_g32"
    assert found["embed"].scheme == "float32" and found["layers.0.attn.v_proj.weight"].scheme == "float32"
    assert found["layers.0.attn.q_proj+k_proj.weight"].scheme == "int4_g32"
    assert found["layers.1.attn.q_proj+k_proj+v_proj.weight"].scheme == "int4_g32"


def test_experts_are_quantized_and_their_router_is_not() -> None:
    _, lowered = compiled("experts", options("int8"))
    found = by_name(lowered)
    assert "experts" in found["layers.0.mlp.router.weight"].reason
    assert [found[f"layers.0.mlp.{n}"].scheme for n in ("gate_up", "down")] == ["int8_g32", "int8_g32"]
    assert found["layers.0.attn.o_proj.weight"].scheme == "int8_g32"


def test_experts_are_quantized_together_or_not_at_all() -> None:
    _, lowered = compiled("experts", options("int8", r"layers\.0\..*down=none"))
    found = by_name(lowered)
    assert found["layers.0.mlp.down"].scheme == found["layers.0.mlp.gate_up"].scheme == "bfloat16"
    assert "layers.0.mlp.down of these experts stays" in found["layers.0.mlp.gate_up"].reason
    assert found["layers.1.mlp.gate_up"].scheme == "int8_g32"


def test_experts_on_gpus_are_quantized_where_their_layout_takes_the_scheme() -> None:
    target = targets.parse("opencl:generic")
    found = {}
    for quant in ("int4", "mxfp4"):
        built = graphs.build(graphs.CASES["experts"])
        found[quant] = lower(built.module, built.table, target, replace(OPTIONS, quantization=options(quant)))
    records = {quant: by_name(lowered)["layers.0.mlp.gate_up"] for quant, lowered in found.items()}
    assert (records["int4"].scheme, records["int4"].reason) == ("int4_g32", "")
    assert {k.family for k in found["int4"].kernels if "moe" in k.op} == {"gpu.quantized_moe"}
    assert records["mxfp4"].scheme == "bfloat16" and "gpu.mma stores integers" in records["mxfp4"].reason
    assert {k.family for k in found["mxfp4"].kernels if "moe" in k.op} == {"gpu.moe"}


def test_errors_are_known_once_weights_are_read() -> None:
    built, lowered = compiled("grouped", options("int4"))
    for name in lowered.weights:
        graphs.stored(built.table, name)
    original = graphs.build(graphs.CASES["grouped"])
    weight = graphs.stored(original.table, "layers.0.attn.o_proj.weight")
    expected = np.linalg.norm(quantize(weight, scheme("int4")).dequantize() - weight) / np.linalg.norm(weight)
    assert by_name(lowered)["layers.0.attn.o_proj.weight"].error == pytest.approx(float(expected), rel=1e-5)
    lines = rows(lowered.stored)
    text = "\n".join(table(lines))
    assert "layers.*.attn.o_proj.weight" in text and "2 × int4_g32" in text
    stored_bits = sum(8 * built.table[w].nbytes for w in lowered.weights)
    total = sum(line.weights for line in lines)
    assert bits_per_weight(lines) == pytest.approx(stored_bits / total, rel=0.5)


@pytest.mark.parametrize(
    ("quant", "keep", "words"),
    [
        ("int9", (), "unknown quantization scheme 'int9'"),
        ("int4_g48", (), "groups of 48"),
        ("q4_k", (), "cannot be rounded to q4_k"),
        ("int4", ("lm_head",), "NAME=SCHEME"),
        ("int4", ("(=int8",), "no regular expression"),
    ],
)
def test_wrong_options_say_what_to_do(quant: str, keep: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        QuantOptions(quant, keep)


def test_stored_dtypes_are_known() -> None:
    built, lowered = compiled("grouped", options("fp8_e4m3"))
    for name in lowered.weights:
        param = built.table[name]
        assert graphs.stored(built.table, name).dtype == DTYPES[param.dtype]
