"""Calibration on whole graphs: the streaming run against the interpreter, and the methods through all passes and machine code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.dialect import interpreter
from llmc.errors import UsageError
from llmc.passes.pipeline import PASSES, Lowered, Plan, _State, lower
from llmc.passes.quantize.calibrate import Calibration, calibrate
from llmc.passes.quantize.forward import Forward
from llmc.passes.quantize.options import QuantOptions
from llmc.passes.quantize.report import Stored
from llmc.passes.quantize.rounded import Rounded
from llmc.passes.rewrite import Graph, op_name
from tests.passes.test_end_to_end import OPTIONS, TARGET, Machine
from tests.support import graphs
from tests.support.stepper import Stepper, mixed_schedule

WINDOWS, LENGTH = 8, 20


def prepared(config: graphs.Config, quantization: QuantOptions | None = None) -> tuple[graphs.Built, Graph]:
    """The graph as it is when it is calibrated."""
    built = graphs.build(config)
    graph = Graph.of("main", built.module["main"])
    options = quantization or QuantOptions()
    state = _State([graph], built.table, TARGET, replace(OPTIONS, quantization=options), Plan(options))
    for name, run in PASSES:
        if name == "calibrate":
            break
        run(state)
    return built, state.graphs[0]


def stored(config: graphs.Config, quantization: QuantOptions, folder: Path) -> list[Stored]:
    """How weights are stored, once all have been read; no kernel is made."""
    built = graphs.build(config)
    options = replace(OPTIONS, quantization=quantization, calibration=Calibration(tokens(config), folder))
    state = _State([Graph.of("main", built.module["main"])], built.table, TARGET, options, Plan(quantization))
    for name, run in PASSES:
        run(state)
        if name == "quantize":
            break
    for param in built.table.values():
        param.source.read()
    return state.plan.stored


def tokens(config: graphs.Config, windows: int = WINDOWS, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.vocab, (windows, length))


def logits(built: graphs.Built, graph: Graph, ids: np.ndarray) -> np.ndarray:
    """Of the interpreter, in float64, window by window."""
    given = {"positions": np.arange(ids.shape[1])}
    return np.concatenate(
        [interpreter.run(graph.module(), built.arguments(graph.params, {**given, "input_ids": row})) for row in ids]
    )


@pytest.mark.parametrize("case", graphs.CASES)
def test_a_run_over_windows_is_the_interpreters(case: str) -> None:
    built, graph = prepared(graphs.CASES[case])
    ids = tokens(built.config, 3, 9)
    run = Forward(graph, built.table, ids)
    run.visit(lambda *_: None, lambda *_: None)
    found, expected = run.values[graph.output], logits(built, graph, ids)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    assert set(run.values) <= {graph.output, *graph.params[: graph.inputs]}, "values are let go after their last reader"


WIDE = replace(graphs.CASES["grouped"], hidden=48, heads=6, kv_heads=2, head_dim=8, inner=70)
CONFIGS = {
    "grouped": WIDE,
    "layer_norm": replace(WIDE, norm="layer", bias=True, gated=False, activation="gelu"),
    "offset_norm": replace(WIDE, norm="rms1", sandwich=True, tied=True),
    "parallel": replace(WIDE, norm="layer", parallel=True, bias=True),
    "half": replace(WIDE, storage="bfloat16", qk_norm=True, layout="nhd"),
}


@pytest.mark.parametrize(("method", "config"), [*(("awq", c) for c in CONFIGS), ("gptq", "half")])
def test_seven_bits_change_next_to_nothing(config: str, method: str, tmp_path: Path) -> None:
    """Scales in the wrong place would: the rounding error of 7 bits is small beside them."""
    options = QuantOptions("int7_g16", method=method)
    built, graph = prepared(CONFIGS[config], options)
    ids = tokens(CONFIGS[config])
    exact = logits(built, graph, ids)
    calibrate(graph, built.table, method, TARGET, Calibration(ids, tmp_path))
    assert sum(isinstance(p.source, Rounded) for p in built.table.values()) == sum(
        op_name(v) == "llmc.linear" and v.args[1].name not in ("lm_head.weight", "embed") for _, v in graph.bindings
    )
    assert np.linalg.norm(logits(built, graph, ids) - exact) < 0.1 * np.linalg.norm(exact)


def test_smoothquant_keeps_the_model_and_w8a8_says_what_becomes_of_inputs(tmp_path: Path) -> None:
    options = QuantOptions("w8a8", method="smoothquant")
    built, graph = prepared(WIDE, options)
    ids = tokens(WIDE)
    exact = logits(built, graph, ids)
    norm = built.table["layers.0.norm1.weight"].source.read()
    calibrate(graph, built.table, "smoothquant", TARGET, Calibration(ids, tmp_path))
    assert np.abs(built.table["layers.0.norm1.weight"].source.read() / norm - 1).max() > 0.1, "scales went into the norm"
    assert np.linalg.norm(logits(built, graph, ids) - exact) < 0.05 * np.linalg.norm(exact)
    found = {record.name: record.reason for record in stored(WIDE, options, tmp_path)}
    assert found["layers.0.mlp.down_proj.weight"] == "smoothquant, inputs in int8"
    found = {record.name: record.reason for record in stored(WIDE, QuantOptions("w8a8_fp8"), tmp_path)}
    assert found["layers.0.mlp.down_proj.weight"] == "inputs as they are: no kernel here rounds them to fp8_e4m3"


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_smoothquant_divides_what_is_looked_up_in_a_smoothed_output_matrix(storage: str, tmp_path: Path) -> None:
    config = replace(CONFIGS["offset_norm"], storage=storage)
    built, graph = prepared(config, QuantOptions("int8", method="smoothquant"))
    ids = tokens(config)
    exact, embedding = logits(built, graph, ids), built.table["embed"].source.read().astype(np.float32)
    calibrate(graph, built.table, "smoothquant", TARGET, Calibration(ids, tmp_path))
    ratio = built.table["embed"].source.read().astype(np.float32) / embedding
    assert np.abs(ratio[0] - 1).max() > 0.1 and np.abs(ratio / ratio[0] - 1).max() < 0.01, "a factor for each column"
    assert sum(op_name(value) == "relax.multiply" for _, value in graph.bindings) > 0
    assert [p.name for p in built.table.values() if "inverse_scales" in p.name] == ["llmc.inverse_scales.0"]
    assert np.linalg.norm(logits(built, graph, ids) - exact) < (1e-5 if storage == "float32" else 0.05) * np.linalg.norm(exact)


def lowered_model(config: graphs.Config, quantization: QuantOptions, folder: Path) -> tuple[graphs.Built, Lowered]:
    built = graphs.build(config)
    calibration = Calibration(tokens(config), folder) if quantization.calibrated else None
    options = replace(OPTIONS, quantization=quantization, calibration=calibration)
    return built, lower(built.module, built.table, TARGET, options)


def error(config: graphs.Config, quantization: QuantOptions, folder: Path) -> float:
    """The relative error of all logits of machine code on text like the calibration text."""
    built, lowered = lowered_model(config, quantization, folder)
    original, ids = graphs.build(config), tokens(config)[:3, :11]
    stepper = Stepper(Machine(built, lowered, OPTIONS.kv_dtype), list(ids), OPTIONS.page_size, 12)
    mixed_schedule(stepper)
    found, expected = [], []
    for row, values in zip(ids, stepper.logits, strict=True):
        given = {"input_ids": row, "positions": np.arange(len(row))}
        exact = interpreter.run(original.module, original.arguments(original.module["main"].params, given))
        found += list(values.values())
        expected += [exact[position] for position in values]
    return float(np.linalg.norm(np.array(found) - np.array(expected)) / np.linalg.norm(expected))


@pytest.mark.slow
def test_machine_code_of_calibrated_weights_is_nearer_to_the_model(tmp_path: Path) -> None:
    errors = {m: error(WIDE, QuantOptions("int3_g16", method=m), tmp_path) for m in ("rtn", "awq", "gptq")}
    assert errors["gptq"] < 0.85 * errors["rtn"] and errors["awq"] < 0.95 * errors["rtn"], errors


def test_the_table_names_the_method_and_its_error(tmp_path: Path) -> None:
    found = {record.name: record for record in stored(WIDE, QuantOptions("int4_g16", method="gptq"), tmp_path)}
    down, head = found["layers.0.mlp.down_proj.weight"], found["lm_head.weight"]
    assert down.scheme == "int4_g16" and down.reason == "gptq" and 0.05 < (down.error or 0) < 0.5
    assert head.scheme == "int8" and not head.reason and (head.error or 1) < 0.02
    merged = found["layers.0.attn.q_proj+k_proj+v_proj.weight"]
    assert merged.reason == "gptq" and 0.05 < (merged.error or 0) < 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant": "int4", "method": "magic"}, "unknown quantization method 'magic'"),
        ({"method": "gptq"}, "--method gptq has nothing to round"),
        ({"quant": "none", "method": "awq"}, "--method awq has nothing to round"),
    ],
)
def test_wrong_options_say_what_to_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QuantOptions(**options)
