"""Relax operators that are left -> PrimFuncs, each distinct (operator, attributes, operand types) legalised once.

before::                                           after::

    y = relax.multiply(nn.silu(g), u)  # 32 times     s = call_tir(silu, [g]);  y = call_tir(multiply, [s, u])   # 2 PrimFuncs

``relax.transform.LegalizeOps`` builds a TE graph at every call site (some 35 ms per layer) and drops the copies afterwards.
Here it sees one function of one operator per signature; symbolic dimensions are compared by position, not by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import relax, tirx

from llmc.errors import UnsupportedError
from llmc.passes.rewrite import Binding, op_name, operands, substitute


class PrimFuncs:
    """The PrimFuncs of the module being built: structurally equal ones are kept once, names are made unique."""

    def __init__(self) -> None:
        self._builder = relax.BlockBuilder()

    def add(self, name: str, function: tirx.PrimFunc) -> tvm.ir.GlobalVar:
        """The global variable of ``function``, or of one equal to it. ``function`` becomes private: the last pass names it."""
        if "global_symbol" in function.attrs:
            function = function.without_attr("global_symbol")
        return self._builder.add_func(function, name)

    def module(self) -> tvm.IRModule:
        return self._builder.get()


@dataclass
class _Template:
    """``function`` legalises to one ``call_tir`` of ``kernel`` over these parameters of it, or to a list of bindings."""

    function: relax.Function
    kernel: tvm.ir.GlobalVar
    arguments: list[int]


class Legalizer:
    """Legalises single calls, remembering signatures."""

    def __init__(self, functions: PrimFuncs) -> None:
        self.functions = functions
        self._seen: dict[int, list[_Template]] = {}

    def lower(self, var: relax.Var, value: relax.Call) -> list[Binding]:
        """Bindings of ``call_tir`` that compute ``var``. Raises UnsupportedError for an operator without a legalisation."""
        leaves = list(dict.fromkeys(operands(value)))
        inputs = [relax.Var(f"p{i}", v.ty) for i, v in enumerate(leaves)]
        call = substitute(value, dict(zip(leaves, inputs, strict=True)))
        result = relax.Var("result", var.ty)
        body = relax.SeqExpr([relax.DataflowBlock([relax.VarBinding(result, call)])], result)
        function = relax.Function(inputs, body, var.ty, is_pure=True)
        key = tvm_ffi.structural_hash(function, map_free_vars=True)
        for template in self._seen.get(key, []):
            if tvm_ffi.structural_equal(function, template.function, map_free_vars=True):
                return [(var, relax.call_tir(template.kernel, [leaves[i] for i in template.arguments], var.ty))]
        bindings = self._legalized(function, op_name(value))
        if len(bindings) == 1:
            kernel, arguments, *symbols = bindings[0][1].args
            index = {p: i for i, p in enumerate(inputs)}
            if not symbols and all(a in index for a in arguments.fields):
                template = _Template(function, kernel, [index[a] for a in arguments.fields])
                self._seen.setdefault(key, []).append(template)
        back: dict[relax.Var, relax.Expr] = dict(zip(inputs, leaves, strict=True))
        lowered: list[Binding] = []
        for position, (bound, expr) in enumerate(bindings):
            target = var if position == len(bindings) - 1 else relax.DataflowVar(bound.name, bound.ty)
            lowered.append((target, substitute(expr, back)))
            back[bound] = target
        return lowered

    def _legalized(self, function: relax.Function, name: str) -> list[Binding]:
        """The bindings of ``function`` after LegalizeOps, its PrimFuncs moved to the module being built."""
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        module = relax.transform.LegalizeOps()(module)
        moved = {gv: self.functions.add(gv.name_hint, f) for gv, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
        bindings: list[Binding] = []
        for block in module["main"].body.blocks:
            for b in block.bindings:
                if op_name(b.value) != "relax.call_tir":
                    raise UnsupportedError(f"the operator {name} has no lowering to a kernel: the model cannot be compiled")
                kernel, *rest = b.value.args
                bindings.append(
                    (b.var, relax.Call(b.value.op, [moved[kernel], *rest], b.value.attrs, b.value.ty_args, ret_ty=b.var.ty))
                )
        return bindings
