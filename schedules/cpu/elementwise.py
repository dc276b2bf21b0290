"""The schedule of what Relax legalises and fuses by itself: elementwise and reduction PrimFuncs out of FuseTIR.

before::                                              after::

    for i, j: t[i, j] = sigmoid(x[i, j])                  if n * 1536 ≥ PARALLEL_WORK: for i in parallel(n): ...
    for i, j: y[i, j] = x[i, j] * t[i, j] * u[i, j]       else:                        for i in serial(n):
                                                              for jo, ji in vectorized: y[...] = x * sigmoid(x) * u

Elementwise producers are inlined; the innermost static dimension becomes vectors; the outermost loops run on all threads if
their work, known when the kernel runs, is worth it. A reduction keeps its order and is only spread over its outer loops.
``exp``, which LLVM would otherwise call per lane from libm, is lowered to a polynomial.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, s_tir, tirx
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx import register_intrin_lowering

from llmc.schedules.cpu.emit import PARALLEL_WORK, vector
from llmc.schedules.cpu.math import LN2_HIGH, LN2_LOW, LOG2_E, ROUND, exp_coefficients
from llmc.targets.base import Target

Expr = Any


def schedule(function: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """The PrimFunc with parallel outer loops and vectorised inner ones; unchanged if its loops are of another kind."""
    if function.attrs.get("tirx.is_scheduled", False):
        return function
    if not isinstance(function.body, s_tir.SBlockRealize) or function.body.block.name_hint != "root":
        return function  # an opaque operator (a scatter): its loops are inside one block, which no schedule can see into
    sch = s_tir.Schedule(function)
    if not sch.get_child_blocks(sch.get_sblock("root")):
        return function
    _inline(sch)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_block(sch, block, target)
    scheduled = sch.mod["main"]
    return _start_threads_if_worth_it(scheduled).with_attr("tirx.is_scheduled", True)


def _kinds(sch: s_tir.Schedule, block: Any) -> list[int]:
    """The kinds of a block's axes: 0 spatial, 2 reduction."""
    return [int(v.iter_type) for v in sch.get(block).iter_vars]


def _inline(sch: s_tir.Schedule) -> None:
    """Inline every elementwise block into its consumers, where TVM's own preconditions allow it."""
    root = sch.get_sblock("root")
    outputs = {sch.get(b).name_hint for b in sch.get_output_blocks(root)}
    for block in sch.get_child_blocks(root):
        if sch.get(block).name_hint in outputs or any(_kinds(sch, block)):
            continue
        readers = sch.get_consumers(block)
        if any(any(_kinds(sch, r)) for r in readers):
            # Inlined into a reduction it would be computed once per step of a loop that the schedule cannot vectorise.
            continue
        try:
            sch.compute_inline(block)
        except ScheduleError:
            # A block whose region is not the identity of its axes stays a loop of its own: slower, and right.
            continue


def _schedule_block(sch: s_tir.Schedule, block: Any, target: Target) -> None:
    """Vectorise the innermost loop of an elementwise block, and mark the fused outer spatial loops parallel."""
    loops = sch.get_loops(block)
    kinds = _kinds(sch, block)
    if len(loops) != len(kinds) or not loops:
        return
    outer, inner = list(loops), None
    spatial = 0
    while spatial < len(kinds) and kinds[spatial] == 0:
        spatial += 1
    if spatial == len(kinds):
        extent = sch.get(loops[-1]).extent
        lanes = _dividing_lanes(extent, target)
        if lanes > 1:
            rest, inner = sch.split(loops[-1], factors=[None, lanes])
            sch.vectorize(inner)
            outer = [*loops[:-1], rest]
            # Threads share out rows; a single row is shared out by its vectors.
            outer = outer[:-1] if len(outer) > 1 else outer
    else:
        outer = loops[:spatial]
    # Only the first of the fused loops may have a symbolic extent: TVM's analysis of the quotient by a later one, which it has
    # to take for possibly zero, fails.
    later = [i for i, loop in enumerate(outer) if i > 0 and not isinstance(sch.get(loop).extent, tirx.IntImm)]
    outer = outer[: later[0]] if later else outer
    if outer:
        sch.parallel(sch.fuse(*outer))


def _dividing_lanes(extent: Expr, target: Target) -> int:
    """The widest vector that divides a static extent."""
    if not isinstance(extent, tirx.IntImm):
        return 1
    lanes = target.lanes(32)
    while int(extent) % lanes:
        lanes //= 2
    return lanes


def _start_threads_if_worth_it(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Choose at run time between a parallel loop and the same loop on one thread, by the number of elements."""
    realize = function.body
    root = realize.block
    stages = list(root.body) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    body = [_either(stage) for stage in stages]
    block = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, body[0] if len(body) == 1 else tirx.SeqStmt(body),
        root.init, root.alloc_buffers, root.match_buffers, root.annotations,
    )  # fmt: skip
    twice = function.with_body(s_tir.SBlockRealize(realize.iter_values, realize.predicate, block))
    # The two copies of a loop share their variables, which TVM's analyses take for one.
    return s_tir.transform.ConvertSSA()(IRModule({"main": twice}))["main"]


def _either(stage: Any) -> Any:
    if not isinstance(stage, tirx.For) or stage.kind != tirx.ForKind.PARALLEL:
        return stage
    work, inner = stage.extent, stage.body
    while isinstance(inner, tirx.For):
        work, inner = work * inner.extent, inner.body
    serial = tirx.For(stage.loop_var, stage.min, stage.extent, tirx.ForKind.SERIAL, stage.body)
    if isinstance(work, tirx.IntImm):
        return stage if int(work) >= PARALLEL_WORK else serial
    return tirx.IfThenElse(work >= tirx.const(PARALLEL_WORK, "int64"), stage, serial)


def _exp(call: tirx.Call) -> Expr:
    """exp as a polynomial, for ``tirx.exp`` of float32 vectors and scalars; as :meth:`llmc.schedules.cpu.math.Math.exp`."""
    dtype = str(call.ty.dtype)
    if not dtype.startswith("float32"):
        return call
    lanes = int(dtype.partition("x")[2] or 1)

    def constant(value: float, kind: str = "float32") -> Expr:
        return tirx.const(value, kind) if lanes == 1 else tirx.Broadcast(tirx.const(value, kind), lanes)

    floats, integers = vector("float32", lanes), vector("int32", lanes)
    x, bits, n, r = tirx.Var("x", floats), tirx.Var("bits", integers), tirx.Var("n", floats), tirx.Var("r", floats)
    p = constant(exp_coefficients()[-1])
    for c in reversed(exp_coefficients()[:-1]):
        p = p * r + constant(c)
    p = (p * (r * r) + r) + constant(1.0)
    result = tirx.reinterpret(floats, tirx.reinterpret(integers, p) + (bits << constant(23, "int32")))
    result = tirx.Let(r, (x - n * constant(LN2_HIGH)) - n * constant(LN2_LOW), result)
    result = tirx.Let(n, tirx.reinterpret(floats, bits) - constant(ROUND), result)
    result = tirx.Let(bits, tirx.reinterpret(integers, x * constant(LOG2_E) + constant(ROUND)), result)
    return tirx.Let(x, tirx.max(tirx.min(call.args[0], constant(88.7)), constant(-87.0)), result)


register_intrin_lowering("tirx.exp", target="llvm", f=_exp, level=99)
