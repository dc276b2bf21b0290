"""A tiny bfloat16 model, every kernel of both phases through the emulator, against transformers in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import ml_dtypes
import numpy as np
import pytest
from tvm import relax, tirx

from llmc import targets
from llmc.dialect.interpreter import evaluate
from llmc.importer.model import import_model
from llmc.importer.resolve import resolve
from llmc.passes import pipeline
from llmc.passes.pipeline import Options
from llmc.passes.rewrite import Graph, op_name
from llmc.reference import reference_model
from llmc.targets.base import Target
from llmc.weights_file import stored
from tests.kernels.harness import DTYPES
from tests.support.cuda_emulator import run
from tests.support.stepper import Stepper, page_shapes

OPTIONS = Options(page_size=16, kv_dtype="bfloat16", context=32, max_batch=4, max_rows=16, max_logit_rows=8)
PAGES = 6
EVEN = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
"""Sizes that the kernels for sm_90a take."""


class Machine:
    """The fused module of a model, run call by call: a callable for :class:`Stepper`."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.target = target
        imported = import_model(resolve(str(folder)), storage_dtype="bfloat16", compute_dtype="bfloat16", context=32)
        graph = Graph.of("main", imported.mod["main"])
        graph.remove_unused_params(imported.params)
        state = pipeline._State([graph], imported.params, self.target, OPTIONS, pipeline.Plan(OPTIONS.quantization))
        for name, step in pipeline.PASSES:
            step(state)
            if name == "fuse_operators":
                break
        self.module: Any = state.module
        self.kernels = {
            var: targets.module_for(self.target).schedule(f, self.target)
            for var, f in self.module.functions.items()
            if isinstance(f, tirx.PrimFunc)
        }
        assert state.library is not None
        self.fused = any(k.op == "llmc.rope_attend" for k in state.library.choices())
        shapes = page_shapes(state.kv_layers, PAGES, OPTIONS.page_size)
        self.pages = [np.zeros(shape, ml_dtypes.bfloat16) for shape in shapes]
        self.weights = [stored(imported.params[name]) for name in state.weights]

    def __call__(self, phase: str, inputs: dict[str, np.ndarray], rows: int) -> np.ndarray:
        function = self.module[phase]
        arrays = [*inputs.values(), *self.pages, *self.weights]
        values: dict[Any, np.ndarray] = dict(zip(function.params, arrays, strict=True))
        symbols: dict[Any, int] = {}
        for param, array in values.items():
            symbols |= {d: size for d, size in zip(param.ty.shape, array.shape, strict=True) if isinstance(d, tirx.Var)}
        for block in function.body.blocks:
            for binding in block.bindings:
                values[binding.var] = self._value(binding, values, symbols)
        return values[function.body.body]

    def _value(self, binding: Any, values: dict[Any, np.ndarray], symbols: dict[Any, int]) -> np.ndarray:
        call = binding.value
        if isinstance(call, relax.Var):
            return values[call]
        if isinstance(call, relax.TupleGetItem):
            return values[call.tuple_value][call.index]
        if op_name(call) == "relax.reshape":
            return values[call.args[0]].reshape(self._shape(binding.var.ty, symbols))
        arrays = [values[a] for a in call.args[1].fields]
        places = [int(i) for i in call.attrs.inplace_indices] if op_name(call) == "relax.call_tir_inplace" else [-1]
        results = list(binding.var.ty.fields) if isinstance(binding.var.ty, relax.TupleType) else [binding.var.ty]
        new = [self._empty(ty, symbols) for ty, place in zip(results, places, strict=True) if place < 0]
        after = run(self.kernels[call.args[0]], self.target, *arrays, *new)
        fresh = iter(after[len(arrays) :])
        for place in places:
            if place >= 0:
                arrays[place][...] = after[place]
        values_of = tuple(next(fresh) if place < 0 else arrays[place] for place in places)
        return values_of if isinstance(binding.var.ty, relax.TupleType) else values_of[0]

    def _empty(self, ty: relax.TensorType, symbols: dict[Any, int]) -> np.ndarray:
        """A tensor nothing has been written to: NaN, or a number that no index is."""
        dtype = np.dtype(DTYPES[str(ty.dtype)])
        return np.full(self._shape(ty, symbols), -1 if dtype.kind == "i" else np.nan, dtype)

    def _shape(self, ty: relax.TensorType, symbols: dict[Any, int]) -> list[int]:
        return [evaluate(d, symbols) for d in ty.shape]


# Slow: every thread of every kernel of a whole model is emulated.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "arch"),
    [("llama", "sm_80"), ("gemma2", "sm_80"), ("mixtral", "sm_80"), ("llama", "sm_90a"), ("qwen3", "sm_90a")],
)
def test_prefill_and_decode(model_type: str, arch: str, tiny_model_dir: Callable[..., Path]) -> None:
    sizes = EVEN if arch == "sm_90a" else {}
    folder = tiny_model_dir(model_type, **sizes)
    machine, reference = Machine(folder, targets.parse(f"cuda:{arch}")), reference_model(str(folder))
    assert machine.fused == bool(sizes)
    sequences = [np.random.default_rng(5).integers(0, 200, n) for n in (7, 4)]
    stepper = Stepper(machine, sequences, OPTIONS.page_size, PAGES)
    stepper.extend([(0, 5), (1, 3)], wanted=[3, 4, 7])
    stepper.decode([1, 0])
    stepper.extend([(0, 1)])
    for ids, found in zip(sequences, stepper.logits, strict=True):
        expected = reference.logits([int(i) for i in ids])
        for position, row in found.items():
            assert row.dtype == np.float32
            assert np.abs(row - expected[position]).max() < 3e-2 * np.abs(expected).max(), position
