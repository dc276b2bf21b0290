"""Functions beside the phases: choose tokens from logits, and make a decode step's arrays those of the next step.

added::

    sample(logits [r, vocab], draws [n, fields], positions [n], counts [slots, vocab]) -> tokens [n]
      s = call_tir(sample_stats, [logits, draws, counts])
      tokens, counts = call_tir_inplace(sample, [logits, draws, positions, counts, s])
    advance(tokens [n], input_ids [n], positions [n], seq_lens [n], block_table [n, m]) -> slot_mapping [n]

They need no graph of the model, only its vocabulary and the page size. ``decode``, ``sample`` and ``advance`` in turn generate
without the host: one CUDA graph. See :mod:`llmc.manifest` for what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import TensorType

from llmc.passes.lower_kernels import KernelLibrary
from llmc.passes.shapes import plain
from llmc.runtime.draws import FIELDS
from llmc.schedules.protocol import KernelCall, TensorSpec

FUNCTIONS = ("sample", "advance")
OPS = ("llmc.sample_stats", "llmc.sample", "llmc.advance")


def samples_on_device(families: Sequence[Any]) -> bool:
    """Whether a target's families hold what the functions take; elsewhere the host samples."""
    return set(OPS) <= {family.OP for family in families}


def _spec(tensor: TensorType) -> TensorSpec:
    return TensorSpec(tuple(d.name if isinstance(d, tirx.Var) else int(plain(d)) for d in tensor.shape), str(tensor.dtype))


class _Functions:
    """Builds functions over kernels of a library."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self.built: dict[str, relax.Function] = {}

    def kernel(self, function: str, op: str, args: Sequence[TensorType], result: TensorType, **attrs: Any) -> tvm.ir.GlobalVar:
        call = KernelCall(op, tuple(_spec(a) for a in args), _spec(result), tuple(sorted(attrs.items())), function)
        return self._library.kernel(function, call)

    def add(self, name: str, params: Sequence[relax.Var], body: Any, bounds: dict[str, int]) -> None:
        """Function ``name`` whose result is ``body(builder)``; ``bounds``: the most that each of its dimensions can be."""
        builder = relax.BlockBuilder()
        with builder.function(name, list(params), attrs={"num_input": 0, "tir_var_upper_bound": bounds}):
            with builder.dataflow():
                result = builder.emit_output(body(builder))
            builder.emit_func_output(result)
        self.built[name] = builder.get()[name]


def _variables(**types: TensorType) -> list[relax.Var]:
    return [relax.Var(name, t) for name, t in types.items()]


def _sample(functions: _Functions, vocab: int, max_batch: int, max_logit_rows: int) -> None:
    from llmc.schedules.cuda.sample_stats import CHUNK, WIDTH

    r, n, slots = (tirx.Var(name, "int64") for name in ("r", "n", "slots"))
    logits, draws, row = TensorType([r, vocab], "float32"), TensorType([n, len(FIELDS)], "int32"), TensorType([n], "int32")
    counts, stats = TensorType([slots, vocab], "int16"), TensorType([n, -(-vocab // CHUNK), WIDTH], "int32")
    look = functions.kernel("sample", OPS[0], (logits, draws, counts), stats)
    choose = functions.kernel("sample", OPS[1], (logits, draws, row, counts, stats), row)
    params = _variables(logits=logits, draws=draws, positions=row, counts=counts)

    def chosen(b: relax.BlockBuilder) -> relax.Expr:
        s = b.emit(relax.call_tir(look, [params[0], params[1], params[3]], stats))
        both = b.emit(relax.call_tir_inplace(choose, [*params, s], [-1, 3], [row, counts]))
        return relax.TupleGetItem(both, 0)

    functions.add("sample", params, chosen, {"r": max(max_logit_rows, max_batch), "n": max_batch})


def _advance(functions: _Functions, page_size: int, max_batch: int, max_pages: int) -> None:
    n, m = (tirx.Var(name, "int64") for name in ("n", "m"))
    row, table = TensorType([n], "int32"), TensorType([n, m], "int32")
    step = functions.kernel("advance", OPS[2], (row, row, row, row, table), row, page_size=page_size)
    params = _variables(tokens=row, input_ids=row, positions=row, seq_lens=row, block_table=table)

    def advanced(b: relax.BlockBuilder) -> relax.Expr:
        every = b.emit(relax.call_tir_inplace(step, params, [-1, 1, 2, 3], [row] * 4))
        return relax.TupleGetItem(every, 0)

    functions.add("advance", params, advanced, {"n": max_batch, "m": max_pages})


def add_sampling(
    module: tvm.IRModule, library: KernelLibrary, vocab: int, page_size: int, max_batch: int, max_logit_rows: int, max_pages: int
) -> tvm.IRModule:
    """``module`` with the functions; ``max_pages``: the pages of one sequence."""
    functions = _Functions(library)
    _sample(functions, vocab, max_batch, max_logit_rows)
    _advance(functions, page_size, max_batch, max_pages)
    known = {var.name_hint for var in module.functions}
    for var, kernel in library.functions.module().functions.items():
        if var.name_hint not in known:
            module.update_func(var, kernel)
    for name, function in functions.built.items():
        module[name] = function
    return module
