"""Graph in, machine code out: decode and extend through the VM against the interpreter's forward pass over the whole sequence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm
from tvm import relax

from llmc import targets
from llmc.dialect import interpreter
from llmc.importer.params import Constant, Param, ParamTable
from llmc.kv_layout import page_dtype
from llmc.passes.fingerprint import graph_sha256
from llmc.passes.pipeline import PASSES, Lowered, Options, lower
from llmc.passes.rewrite import Graph
from tests.kernels.harness import DTYPES
from tests.support import graphs
from tests.support.stepper import Stepper, mixed_schedule, page_shapes

TARGET = targets.parse("cpu")
OPTIONS = Options(page_size=4, kv_dtype="float32", context=24, max_batch=4, max_rows=16, max_logit_rows=8)


class Machine:
    """A built module with its weights and pages: a callable for :class:`Stepper`."""

    def __init__(self, built: graphs.Built, lowered: Lowered, kv_dtype: str) -> None:
        module = targets.module_for(TARGET)
        executable = module.build(lowered.mod, TARGET)
        self.vm = relax.VirtualMachine(executable, tvm.cpu())
        self.vocab = built.config.vocab
        shapes = page_shapes(lowered.kv_layers, 12, OPTIONS.page_size, kv_dtype)
        self.pages = [tvm.runtime.tensor(np.zeros(shape, DTYPES[page_dtype(kv_dtype)])) for shape in shapes]
        self.weights = [tvm.runtime.tensor(graphs.stored(built.table, name)) for name in lowered.weights]

    def __call__(self, phase: str, state: dict[str, np.ndarray], rows: int) -> np.ndarray:
        out = tvm.runtime.tensor(np.full((rows, self.vocab), np.nan, np.float32))
        returned = self.vm[phase](out, *[tvm.runtime.tensor(v) for v in state.values()], *self.pages, *self.weights)
        np.testing.assert_array_equal(returned.numpy(), out.numpy())
        return out.numpy()


def compare(case: str, kv_dtype: str, tolerance: float) -> Lowered:
    """Lower, build and run ``case``; compare every logit with the float64 reference."""
    config = graphs.CASES[case]
    built = graphs.build(config)
    lowered = lower(built.module, built.table, TARGET, Options(**{**OPTIONS.__dict__, "kv_dtype": kv_dtype}))
    sequences = [np.random.default_rng(5).integers(0, config.vocab, n) for n in (11, 7, 5)]
    stepper = Stepper(Machine(built, lowered, kv_dtype), sequences, OPTIONS.page_size, 12)
    mixed_schedule(stepper)
    original = graphs.build(config)
    params = original.module["main"].params
    for ids, logits in zip(sequences, stepper.logits, strict=True):
        expected = interpreter.run(
            original.module, original.arguments(params, {"input_ids": ids, "positions": np.arange(len(ids))})
        )
        for position, row in logits.items():
            np.testing.assert_allclose(row, expected[position], rtol=tolerance, atol=tolerance, err_msg=f"position {position}")
    return lowered


@pytest.mark.parametrize("case", ["grouped", "nhd", "offset_norms", "parallel_partial", "experts", "single"])
def test_machine_code_matches_the_reference(case: str) -> None:
    compare(case, "float32", 3e-5)


@pytest.mark.parametrize("case", ["grouped", "windowed", "experts"])
def test_rows_have_the_same_bits_whichever_others_are_wanted(case: str) -> None:
    """The last attention is over the wanted rows alone: all, some of two sequences, one of a chunk that asks for none."""
    config = replace(graphs.CASES["offset_norms"], layers=1) if case == "windowed" else graphs.CASES[case]
    built = graphs.build(config)
    lowered = lower(built.module, built.table, TARGET, OPTIONS)
    machine = Machine(built, lowered, "float32")
    sequences = [np.random.default_rng(6).integers(0, config.vocab, n) for n in (9, 7, 5)]

    def logits(wanted: list[int] | None) -> list[dict[int, np.ndarray]]:
        stepper = Stepper(machine, sequences, OPTIONS.page_size, 12)
        stepper.extend([(0, 5), (1, 2)], wanted=[6])
        stepper.extend([(0, 4), (1, 1), (2, 3)], wanted)
        return stepper.logits

    every = logits(None)
    for wanted in ([2, 3, 5, 6, 7], [4], [7]):
        some = logits(wanted)
        assert sum(map(len, some)) == len(wanted) + 1
        for s, rows in enumerate(some):
            for position, row in rows.items():
                assert np.array_equal(row.view(np.uint32), every[s][position].view(np.uint32)), (s, position)


def test_a_result_that_is_a_view_is_copied_to_the_caller() -> None:
    """A graph without attention whose logits are a reshape of something else."""
    n = tvm.tirx.Var("n", "int64")
    ids, positions = (relax.Var(name, relax.TensorType([n], "int32")) for name in ("input_ids", "positions"))
    values = np.random.default_rng(0).standard_normal((9, 2, 3)).astype(np.float32)
    table = ParamTable([Param("embed", Constant(values, "embed"), "float32")])
    embed = relax.Var("embed", relax.TensorType([9, 2, 3], "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [ids, positions, embed]):
        with bb.dataflow():
            out = bb.emit_output(relax.op.reshape(bb.emit(relax.op.take(embed, ids, axis=0)), [n, 6]))
        bb.emit_func_output(out)
    module = bb.get()
    module["main"] = module["main"].with_attr("num_input", 2)
    built = graphs.Built(module, table, graphs.Config(vocab=6))
    machine = Machine(built, lower(module, table, TARGET, OPTIONS), "float32")
    state = {
        name: np.zeros(1, np.int32) for name in ("input_ids", "positions", "slot_mapping", "q_indptr", "seq_lens", "block_table")
    }
    state |= {
        "input_ids": np.array([4, 1], np.int32),
        "positions": np.arange(2, dtype=np.int32),
        "slot_mapping": np.zeros(2, np.int32),
    }
    state |= {
        "q_indptr": np.array([0, 2], np.int32),
        "block_table": np.zeros((1, 1), np.int32),
        "logit_rows": np.array([1], np.int32),
    }
    np.testing.assert_array_equal(machine("extend", state, 1), values[[1]].reshape(1, 6))


def test_narrow_kv_cache() -> None:
    lowered = compare("pairs", "float16", 2e-2)
    assert any("float16" in k.shape for k in lowered.kernels if k.op == "llmc.attend")


@pytest.mark.parametrize(("kv_dtype", "case", "tolerance"), [("int8", "grouped", 6e-2), ("int4", "single", 2e-1)])
def test_quantized_kv_cache(kv_dtype: str, case: str, tolerance: float) -> None:
    lowered = compare(case, kv_dtype, tolerance)
    assert all(f"kv_scheme={kv_dtype}" in k.shape for k in lowered.kernels if k.op in ("llmc.attend", "llmc.append"))


def test_what_a_compile_reports(tmp_path: Path) -> None:
    built = graphs.build(graphs.CASES["grouped"])
    seen: list[tuple[int, int, str]] = []
    lowered = lower(built.module, built.table, TARGET, OPTIONS, tmp_path / "ir", lambda *step: seen.append(step))
    assert [name for name, _ in lowered.timings] == [name for name, _ in PASSES]
    dumped = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert len(dumped) == len(PASSES) + 2 and dumped[0] == "00_import.txt" and dumped[-2].endswith("_lower_vm.txt")
    assert set(json.loads((tmp_path / "ir" / "timing.json").read_text())) == {name for name, _ in PASSES}
    assert seen[-1] == (len(PASSES), len(PASSES), "done")
    assert lowered.weights == list(dict.fromkeys(lowered.weights)) and set(lowered.weights) == set(built.table)
    decode, extend = lowered.functions
    assert (decode.name, extend.name) == ("decode", "extend")
    # the widest value of an extend step, 16 rows of 48 float32, needs more than all of decode's 4 rows of it
    assert extend.workspace_bytes > 16 * 48 * 4 > decode.workspace_bytes / 4 > 0
    linears = {k.kernel: k for k in lowered.kernels if k.function == "decode" and k.op == "llmc.linear"}
    assert sum(k.count for k in linears.values()) == 9 and len(linears) == 5
    for name in ("decode", "extend"):
        assert sum(k.count for k in lowered.kernels if k.function == name) == {"decode": decode, "extend": extend}[name].kernels
    assert all(k.why and k.shape and k.family for k in lowered.kernels)


def test_depth_adds_no_kernels() -> None:
    counts = []
    for layers in (2, 5):
        built = graphs.build(graphs.Config(layers=layers))
        lowered = lower(built.module, built.table, TARGET, OPTIONS)
        counts.append(sum(isinstance(f, tvm.tirx.PrimFunc) for f in lowered.mod.functions.values()))
    assert counts[0] == counts[1]


def test_the_hash_is_the_graphs() -> None:
    def digest(**changes: object) -> str:
        built = graphs.build(graphs.Config(**changes), seed=len(changes))  # type: ignore[arg-type]
        return graph_sha256(Graph.of("main", built.module["main"]))

    plain = graphs.build(graphs.Config())
    assert lower(plain.module, plain.table, TARGET, OPTIONS).graph_sha256 == digest()
    assert len({digest(), digest(window=3), digest(heads=2), digest(activation="gelu")}) == 4
