"""Static memory, the result in the caller's buffer, and the lowering to VM instructions.

before::                                        after::

    decode(ids, ...):                               decode(out, ids, ...):
      y = call_tir(f, [x])                            s = alloc_storage(bytes at the upper bounds)
      z = call_tir(g, [y])                            y = alloc_tensor(s, shape)
      return z                                        f(x, y); g(y, out); return out

Intermediate tensors share storages planned for the largest step (``tir_var_upper_bound``), so a call allocates nothing of
unknown size; KV pages are parameters and take no part in the plan. The function returns exactly its ``out`` parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax, te, tirx

from llmc.errors import InternalError
from llmc.passes.rewrite import Binding, op_name, operands, substitute
from llmc.passes.shapes import plain

R = relax.transform


def _bindings(function: relax.Function) -> list[Binding]:
    return [(b.var, b.value) for block in function.body.blocks for b in block.bindings]


def _copy_kernel(result: relax.Var) -> tirx.PrimFunc:
    """``out[...] = x[...]``, for a result that is a view of something."""
    sizes = [tirx.Var(f"d{i}", "int64") for i in range(len(result.ty.shape))]
    x = te.placeholder(sizes, str(result.ty.dtype), "x")
    return te.create_prim_func([x, te.compute(sizes, lambda *index: x(*index), "copy")])


def _write_to_caller(module: tvm.IRModule, name: str) -> tvm.IRModule:
    """Give function ``name`` the first parameter ``out`` and make it write its result there."""
    function = module[name]
    bindings = _bindings(function)
    # A kernel with several results leaves a tuple of them, which nothing reads and which would keep them alive.
    read = {v for _, value in bindings for v in operands(value)}
    bindings = [(v, value) for v, value in bindings if v in read or not isinstance(value, relax.Tuple)]
    result = function.body.body
    out = relax.Var("out", result.ty)
    value = dict(bindings).get(result)
    lowered: list[Binding] = []
    if op_name(value) == "relax.builtin.alloc_tensor":
        lowered = [(v, substitute(e, {result: out})) for v, e in bindings if not v.same_as(result)]
    else:
        builder = relax.BlockBuilder(module)
        kernel = builder.add_func(_copy_kernel(result), "copy_result")
        module = builder.get()
        copy = builder.normalize(relax.Call(kernel, [result, out], ret_ty=relax.TupleType([])))
        lowered = [*bindings, (relax.Var("_", copy.ty), copy)]
    block = relax.BindingBlock([relax.VarBinding(v, e) for v, e in lowered])
    body = relax.SeqExpr([block], out)
    relax.expr._update_type(body, out.ty)
    rewritten = relax.Function([out, *function.params], body, out.ty, is_pure=function.is_pure).with_attrs(
        dict(function.attrs.items())
    )
    module.update_func(module.get_global_var(name), rewritten)
    return module


def plan_memory(module: tvm.IRModule, names: Sequence[str], tvm_target: tvm.target.Target) -> tvm.IRModule:
    """``call_tir`` to calls that write into planned storages. ``names``: the phases."""
    with tvm_target:
        for step in (
            R.ToNonDataflow(),
            R.RemovePurityChecking(),
            R.CallTIRRewrite(),
            R.CanonicalizeBindings(),
        ):
            module = step(module)
        for name in names:
            module = _write_to_caller(module, name)
        return R.StaticPlanBlockMemory()(module)


def storage_sizes(function: relax.Function) -> list[int]:
    """Bytes of each storage that a planned function allocates. Raises InternalError if a size depends on the batch."""
    sizes: list[int] = []
    for var, value in _bindings(function):
        name = op_name(value)
        if name == "relax.builtin.alloc_tensor":
            raise InternalError(f"memory planning left {var.name} ({var.ty}) without a storage: an upper bound is missing")
        if name == "relax.memory.alloc_storage":
            size = plain(next(iter(value.args[0])))
            if not isinstance(size, int):
                raise InternalError(f"the storage {var.name} has the size {size}, which depends on the batch")
            sizes.append(size)
    return sizes


def kernel_calls(function: relax.Function) -> dict[str, list[relax.Call]]:
    """What one call of a planned function runs: the calls of each PrimFunc, by its name."""
    calls: dict[str, list[relax.Call]] = {}
    for _, value in _bindings(function):
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            calls.setdefault(value.op.name_hint, []).append(value)
    return calls


def lower_vm(module: tvm.IRModule, tvm_target: tvm.target.Target) -> tvm.IRModule:
    """The planned module as VM instructions, ready for ``relax.build(..., relax_pipeline=None)``."""
    with tvm_target:
        return tvm.transform.Sequential(
            [
                R.LowerAllocTensor(),
                R.KillAfterLastUse(),
                R.LowerRuntimeBuiltin(),
                R.ComputePrimValue(),
                R.VMShapeLower(),
                R.AttachGlobalSymbol(),
            ]
        )(module)
