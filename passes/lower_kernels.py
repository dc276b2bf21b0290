"""Dialect operators -> calls of kernels from the target's families; other operators -> legalised and fused PrimFuncs.

before::                                         after::

    y = llmc.linear(x, w, b, h, ...)                 y = call_tir(linear_576x1536, [x, w, b, h])
    p = llmc.append(k, v, slots, pages)              p = call_tir_inplace(append, [k, v, slots, pages])
    t = llmc.rope_append(x, ..., pages)              t = call_tir_inplace(rope_append, [x, ..., pages]): (new, pages)
    m = multiply(nn.silu(g), u)                      m = call_tir(fused_silu_multiply, [g, u])

A kernel is built once per distinct :class:`~llmc.schedules.protocol.KernelCall`: 32 layers cost as much as two, and the phases
share equal kernels in one module. Every choice is recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from llmc.dialect.core import attrs_of, is_call
from llmc.manifest import KernelChoice
from llmc.passes.legalize import Legalizer, PrimFuncs
from llmc.passes.rewrite import Binding, Graph, op_name
from llmc.passes.shapes import dims, dtype_of, first_result
from llmc.schedules.lookup import Records
from llmc.schedules.protocol import Dim, KernelCall, TensorSpec
from llmc.schedules.records import call_to_json
from llmc.schedules.registry import choose, signature
from llmc.targets.base import Target

IN_PLACE = {"llmc.append": [3], "llmc.rope_append": [-1, 4], "llmc.rope_attend": [-1, 4]}
"""Operators that write an operand in place: for each result which operand it is, -1 for a new tensor."""

OPAQUE = 8
"""``op_pattern`` that keeps FuseOps from merging anything into a kernel."""


@dataclass
class _Kernel:
    call: KernelCall
    var: tvm.ir.GlobalVar
    family: str
    config: dict[str, Any]
    why: str
    tuned: str


class KernelLibrary:
    """Builds kernels on demand, one per distinct call, and remembers how often each phase runs them.

    ``records``: what was measured; a call that they say nothing of gets its family's default configuration. Without ``early`` no
    kernel starts before the end of the one before it.
    """

    def __init__(
        self, target: Target, families: Sequence[Any], functions: PrimFuncs, records: Records | None = None, early: bool = True
    ) -> None:
        self.target, self.families, self.functions, self.records = target, families, functions, records or Records()
        self.early = early
        self.counts: Counter[tuple[str, KernelCall]] = Counter()
        self._kernels: dict[KernelCall, _Kernel] = {}

    def kernel(self, function: str, call: KernelCall) -> tvm.ir.GlobalVar:
        """The kernel of ``call``, which a call of ``function`` runs once more. Raises UnsupportedError if no family takes it."""
        self.counts[function, call] += 1
        if call not in self._kernels:
            family, why = choose(call, self.target, self.families)
            config, tuned = self._config(family, call)
            built = family.build(call, self.target, config)
            name = str(built.attrs["global_symbol"]) if "global_symbol" in built.attrs else call.op.rpartition(".")[2]
            built = built.with_attr("op_pattern", OPAQUE).with_attr("tirx.is_scheduled", True)
            self._kernels[call] = _Kernel(call, self.functions.add(name, built), family.NAME, config, why, tuned)
        return self._kernels[call].var

    def _config(self, family: Any, call: KernelCall) -> tuple[dict[str, Any], str]:
        """The configuration of a call, and where it is from."""
        found = self.records.lookup(family, call, self.target)
        config = found.config if found else {axis: values[0] for axis, values in family.space(call, self.target).items()}
        if not self.early and "dependent_launch" in config:
            config = {**config, "dependent_launch": False}
        return config, f"{found.origin}: {found.why}" if found else "default"

    def choices(self) -> list[KernelChoice]:
        """One record per phase and kernel, in the order of first use."""
        chosen = []
        for (function, call), count in self.counts.items():
            k = self._kernels[call]
            config = {axis: _plain(value) for axis, value in k.config.items()}
            described = (function, call.op, k.var.name_hint, k.family, count, signature(call), config, k.why)
            chosen.append(KernelChoice(*described, k.tuned, call_to_json(call)))
        return chosen


def _plain(value: Any) -> Any:
    """A config value as JSON can hold it."""
    return list(value) if isinstance(value, tuple) else value


def kernel_call(value: relax.Call, result: relax.Var, phase: str) -> KernelCall:
    """The call as a kernel sees it. Dimensions keep their names, except that a single symbolic one is always ``n``, and so are the
    rows with logits: attention over these is the kernel of all rows."""
    symbols: dict[str, str] = {}

    def dim(d: Any) -> Dim:
        if isinstance(d, int):
            return d
        return symbols.setdefault(str(d), _dim_name(d, len(symbols)))

    specs = [(tuple(dim(d) for d in dims(v)), dtype_of(v)) for v in (*value.args, first_result(result))]
    only = next(iter(symbols.values())) if len(symbols) == 1 else None
    tensors = [TensorSpec(tuple("n" if d == only else d for d in shape) if only else shape, dtype) for shape, dtype in specs]
    return KernelCall(value.op.name, tuple(tensors[:-1]), tensors[-1], tuple(sorted(attrs_of(value).items())), phase)


def generated_choice(function: str, name: str, calls: Sequence[relax.Call]) -> KernelChoice:
    """The record of a PrimFunc that was generated from Relax operators and not taken from a family, and is called by ``calls``."""
    operands = [a for a in calls[0].args if isinstance(a.ty, relax.TensorType)]
    shape = "(" + ", ".join(f"{dtype_of(a)}[{','.join(str(d) for d in dims(a))}]" for a in operands) + ")"
    return KernelChoice(function, "relax", name, "generated", len(calls), shape, {}, "legalised and fused from Relax operators")


def _dim_name(dim: Any, index: int) -> str:
    """``n``, ``b+1``; a name of its own for any other expression."""
    if isinstance(dim, tirx.Var):
        return "n" if dim.name == "r" else str(dim.name)
    if isinstance(dim, tirx.Add) and isinstance(dim.a, tirx.Var) and isinstance(dim.b, tirx.IntImm):
        return f"{dim.a.name}+{int(dim.b.value)}"
    return f"s{index}"


def _lower_graph(graph: Graph, library: KernelLibrary, legalizer: Legalizer) -> None:
    bindings: list[Binding] = []
    for var, value in graph.bindings:
        if is_call(value):
            kernel = library.kernel(graph.name, kernel_call(value, var, graph.name))
            places = IN_PLACE.get(op_name(value))
            if places is None:
                bindings.append((var, relax.call_tir(kernel, list(value.args), var.ty)))
            else:
                results = list(var.ty.fields) if len(places) > 1 else [var.ty]
                bindings.append((var, relax.call_tir_inplace(kernel, list(value.args), places, results)))
        elif isinstance(value, relax.Call) and op_name(value) != "relax.reshape":  # a reshape is a view: no kernel
            bindings.extend(legalizer.lower(var, value))
        else:
            bindings.append((var, value))
    builder = relax.BlockBuilder()
    graph.bindings = [(var, builder.normalize(value)) for var, value in bindings]


def lower_kernels(
    graphs: Sequence[Graph],
    target: Target,
    families: Sequence[Any],
    tvm_target: tvm.target.Target,
    records: Records | None = None,
    early: bool = True,
) -> tuple[tvm.IRModule, KernelLibrary]:
    """All phases in one module of ``call_tir`` and PrimFuncs (not fused yet), and the record of the kernels chosen."""
    functions = PrimFuncs()
    library, legalizer = KernelLibrary(target, families, functions, records, early), Legalizer(functions)
    with tvm_target:
        for graph in graphs:
            _lower_graph(graph, library, legalizer)
    module = functions.module()
    for graph in graphs:
        module[graph.name] = graph.function()
    return module, library
