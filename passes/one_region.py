"""A whole step as one parallel region: one start of the threads per step in place of one per kernel.

before::                                         after::

    s = alloc_storage([9216])                        w = alloc_storage([all of it])
    a = alloc_tensor(s, [b, 576])                    step_decode(out, ids, ..., w)
    take(embedding, ids, a)                          return out
    c = reshape(a, [b, 9, 64])
    ...
    linear(h, lm_head, out)
    return out

``step_decode`` is a TIR function: it takes the tensors' addresses, clears the counters at the start of the workspace, and starts
the threads once. Every thread calls every kernel (:mod:`~llmc.passes.team_kernels`); runs of kernels for one thread are a phase
of their own. Views are addresses. The order of the kernels and the plan of the memory are what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.passes.memory import kernel_calls
from llmc.passes.rewrite import op_name
from llmc.passes.shapes import dims, plain
from llmc.passes.team_kernels import TeamKernel, team_kernel
from llmc.schedules.cpu import team
from llmc.schedules.protocol import Dim, TensorSpec
from llmc.targets.base import Target
from llmc.targets.cpu_pipeline import DIRECT_CALL

ALIGN = 64
DATA, SHAPE = 1, 2  # fields of a DLTensor, as tvm_struct_get numbers them


@dataclass
class _Step:
    """What a phase's function does. ``places``: of every tensor, a parameter's index or an offset in the workspace."""

    params: list[relax.Var]
    places: dict[Any, tuple[str, int]] = field(default_factory=dict)
    calls: list[tuple[TeamKernel, list[relax.Expr]]] = field(default_factory=list)
    size: int = 0

    def take(self, count: int) -> int:
        """The offset of ``count`` more bytes of the workspace."""
        offset = self.size
        self.size += -(-count // ALIGN) * ALIGN
        return offset


def one_region(module: tvm.IRModule, name: str, target: Target, few_rows: bool, chunks: int) -> tvm.IRModule:
    """Function ``name`` of a planned and scheduled module with all of its kernels in one; the module as it is if the function
    does anything that is no kernel on tensors, or the target has no team. ``few_rows``: of a step's rows, as in decode; ``chunks``
    of a kernel for each thread."""
    if not team.has_team(target):
        return module
    function = module[name]
    kernels: dict[str, TeamKernel] = {}
    step = _read(module, function, name, kernels, few_rows, chunks)
    if step is None:
        return module
    bounds = {str(k): int(v) for k, v in function.attrs["tir_var_upper_bound"].items()}
    builder = relax.BlockBuilder(module)
    for kernel in kernels.values():
        builder.add_func(kernel.function, kernel.name)
    var = builder.add_func(_step_function(f"step_{name}", step, bounds, target), f"step_{name}")
    module = builder.get()
    module.update_func(module.get_global_var(name), _caller(function, var, step.size))
    return _without_unused(module)


def repeated(
    kernel: tirx.PrimFunc,
    specs: Sequence[TensorSpec],
    times: Sequence[int],
    bounds: dict[str, int],
    target: Target,
    few_rows: bool,
    chunks: int,
) -> tuple[dict[str, tirx.PrimFunc], dict[int, int]]:
    """``kernel`` as a step of a model calls it: functions by name, among them ``step_N`` for each N of ``times``, which calls it N
    times with tensors of ``specs`` of its own each time, all of them one after the other, and a workspace last; and by N the bytes
    of that.

    ``bounds``: the most that each symbolic dimension is.
    """
    inner = team_kernel("kernel_team", kernel, few_rows, chunks)
    functions, sizes = {inner.name: inner.function}, {}
    for count in sorted(set(times)):
        symbols = {name: tirx.Var(name, "int64") for name in bounds}
        types = [relax.TensorType([_dimension(d, symbols) for d in spec.shape], spec.dtype) for spec in specs]
        sets = [[relax.Var(f"t{i}_{j}", ty) for j, ty in enumerate(types)] for i in range(count)]
        step = _Step([var for one in sets for var in one])
        step.places = {var: ("param", i) for i, var in enumerate(step.params)}
        step.calls = [(inner, list(one)) for one in sets]
        functions[f"step_{count}"] = _step_function(f"step_{count}", step, bounds, target)
        sizes[count] = step.size
    return functions, sizes


def _dimension(dim: Dim, symbols: dict[str, Any]) -> Any:
    """A dimension of a kernel's call: a number, a symbol, or ``b+1``."""
    if isinstance(dim, int):
        return dim
    name, plus, more = dim.partition("+")
    return symbols[name] + int(more) if plus else symbols[name]


def _read(
    module: tvm.IRModule, function: relax.Function, name: str, kernels: dict[str, TeamKernel], few_rows: bool, chunks: int
) -> _Step | None:
    """The function as a :class:`_Step`, its kernels added to ``kernels``; None if it is not made of kernels on tensors."""
    step = _Step(list(function.params))
    storages: dict[Any, int] = {}
    for index, param in enumerate(function.params):
        step.places[param] = ("param", index)
    for binding in (b for block in function.body.blocks for b in block.bindings):
        var, value = binding.var, binding.value
        op = op_name(value)
        if op == "relax.memory.alloc_storage":
            storages[var] = step.take(int(plain(next(iter(value.args[0])))))
        elif op == "relax.memory.alloc_tensor":
            offset = storages[value.args[0]] + int(value.args[1].value)
            step.places[var] = ("workspace", offset)
        elif op == "relax.reshape":
            step.places[var] = step.places[value.args[0]]
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            kernel_name = value.op.name_hint
            if not all(a in step.places for a in value.args):
                return None
            if kernel_name not in kernels:
                kernels[kernel_name] = team_kernel(f"{kernel_name}_team_{name}", module[value.op], few_rows, chunks)
            if _symbols_of(kernels[kernel_name], value.args) is None:
                return None
            step.calls.append((kernels[kernel_name], list(value.args)))
        elif op not in ("relax.memory.kill_tensor", "relax.memory.kill_storage"):
            return None
    return step if step.places.get(function.body.body, ("",))[0] == "param" else None


def _symbols_of(kernel: TeamKernel, args: Sequence[relax.Expr]) -> list[Any] | None:
    """The caller's dimension (a number, or a variable of its) for each of the kernel's symbols; None if one has no plain one."""
    found: list[Any] = []
    for symbol in kernel.symbols:
        plain_dims = [
            theirs
            for buffer, arg in zip(kernel.buffers, args, strict=True)
            for mine, theirs in zip(buffer.shape, dims(arg), strict=True)
            if isinstance(mine, tirx.Var) and mine.same_as(symbol) and isinstance(theirs, int | tirx.Var)
        ]
        if not plain_dims:
            return None
        found.append(plain_dims[0])
    return found


def _scratch(kernel: TeamKernel, args: Sequence[relax.Expr], bounds: dict[str, int]) -> list[int]:
    """Offsets of the kernel's shared buffers in the scratch memory, and behind them what they take together at most."""
    offsets, size = [], 0
    for buffer in kernel.shared:
        offsets.append(size)
        analyzer = tvm.sym.Analyzer()
        for symbol, dim in zip(kernel.symbols, _symbols_of(kernel, args) or [], strict=True):
            most = dim if isinstance(dim, int) else bounds.get(str(dim.name))  # the number of pages has no bound, and no use here
            if most is not None:
                analyzer.bind(symbol, tirx.const(most, "int64"))
        count = prod(int(analyzer.simplify(dim)) for dim in buffer.shape)
        size += -(-count * tvm.DataType(str(buffer.ty.dtype)).bits // (8 * ALIGN)) * ALIGN
    return [*offsets, size]


def _step_function(name: str, step: _Step, bounds: dict[str, int], target: Target) -> tirx.PrimFunc:
    """The function of a step, which then knows the size of its workspace."""
    slots = 1 + sum(kernel.phases or 1 for kernel, _ in step.calls)
    counters = step.take(slots * team.SLOT)
    scratch = step.take(max((_scratch(kernel, args, bounds)[-1] for kernel, args in step.calls), default=0))
    builder = IRBuilder()
    with builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.is_scheduled": True})
        handles = [T.arg(f"t{i}", T.handle()) for i in range(len(step.params) + 1)]
        data = [T.bind(T.tvm_struct_get(h, 0, DATA, "handle")) for h in handles]
        dimensions = _dimensions(step.params, handles)
        threads = T.bind(tirx.Cast("int32", tirx.call_packed("runtime.NumThreads")))
        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
        base = T.bind(team.at(data[-1], counters))
        words = tirx.Cast("int64", (team.Team(threads, zero).ranges + 1) * (slots * team.LINE // 8))
        cleared = T.decl_buffer((slots * team.SLOT // 8,), "int64", data=base)
        with T.serial(tirx.const(0, "int64"), words) as i:
            T.buffer_store(cleared, tirx.const(0, "int64"), [i])
        llvm = tvm.ir.StringImm(team.intrinsics(target))
        with T.attr(zero, "pragma_import_llvm", llvm), T.attr(zero, "pragma_parallel_launch_point", one):
            # TVM asks for a parallel loop in a launch; what the threads do is outside of it.
            with T.parallel(0, 2):
                T.evaluate(team.add(base, zero))
            # The first slot numbers the threads as they come.
            _calls(step, data, dimensions, team.Team(threads, T.bind(team.add(base, one))), base, scratch, bounds)
    return builder.get()


def _dimensions(params: Sequence[relax.Var], handles: Sequence[Any]) -> dict[str, Any]:
    """Each symbolic dimension by name, read from the shape of the first parameter that has it."""
    found: dict[str, Any] = {}
    for param, handle in zip(params, handles, strict=False):
        for axis, dim in enumerate(dims(param)):
            if isinstance(dim, tirx.Var) and str(dim.name) not in found:
                pointer = T.bind(T.tvm_struct_get(handle, 0, SHAPE, "handle"))
                shape = T.decl_buffer((len(dims(param)),), "int64", data=pointer)
                found[str(dim.name)] = T.bind(shape[axis])
    return found


def _calls(
    step: _Step, data: Sequence[Any], dimensions: dict[str, Any], of: team.Team, slots: Any, scratch: int, bounds: dict[str, int]
) -> None:
    def run(kernel: TeamKernel, args: Sequence[relax.Expr], *more: Any) -> None:
        places = [step.places[a] for a in args]
        pointers = [data[where] if kind == "param" else team.at(data[-1], where) for kind, where in places]
        shared = [team.at(data[-1], scratch + offset) for offset in _scratch(kernel, args, bounds)[:-1]]
        values = [
            tirx.const(d, "int64") if isinstance(d, int) else dimensions[str(d.name)] for d in _symbols_of(kernel, args) or []
        ]
        T.evaluate(tirx.call_extern("int32", kernel.name, *pointers, *shared, *values, *more))

    slot = 1
    for alone, group in groupby(step.calls, key=lambda call: call[0].phases is None):
        calls = list(group)
        if alone:

            def all_of_them(calls: Sequence[tuple[TeamKernel, list[relax.Expr]]] = calls) -> None:
                for kernel, args in calls:
                    run(kernel, args)

            team.once(of.slot(slots, slot), all_of_them)
            slot += 1
            continue
        for kernel, args in calls:
            run(kernel, args, of.slot(slots, slot), of.threads, of.rank)
            slot += kernel.phases or 0


def _caller(function: relax.Function, step: tvm.ir.GlobalVar, size: int) -> relax.Function:
    """The Relax function that allocates the workspace and calls the step."""
    builder = relax.BlockBuilder()
    shape = relax.ShapeExpr([size])
    bindings: list[relax.VarBinding] = []

    def bound(name: str, value: relax.Expr) -> relax.Var:
        value = builder.normalize(value)
        var = relax.Var(name, value.ty)
        bindings.append(relax.VarBinding(var, value))
        return var

    storage = bound("storage", relax.op.memory.alloc_storage(shape, 0, "global", "uint8"))
    workspace = bound("workspace", relax.op.memory.alloc_tensor(storage, 0, shape, "uint8"))
    bound("_", relax.Call(step, [*function.params, workspace], ret_ty=relax.TupleType([])))
    out = function.body.body
    body = relax.SeqExpr([relax.BindingBlock(bindings)], out)
    relax.expr._update_type(body, out.ty)
    caller = relax.Function(function.params, body, out.ty, is_pure=function.is_pure)
    return caller.with_attrs(dict(function.attrs.items()))


def _without_unused(module: tvm.IRModule) -> tvm.IRModule:
    """Without the kernels that no Relax function calls any more. Those of a team are called by name."""
    used = {name for f in module.functions.values() if isinstance(f, relax.Function) for name in kernel_calls(f)}

    def kept(var: tvm.ir.GlobalVar, function: Any) -> bool:
        of_team = int(function.attrs.get("calling_conv", 0)) == DIRECT_CALL
        return isinstance(function, relax.Function) or of_team or var.name_hint in used

    return tvm.IRModule({var: f for var, f in module.functions.items() if kept(var, f)}, attrs=module.attrs)
