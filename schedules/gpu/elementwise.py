"""The portable GPU schedule of what Relax legalises and fuses by itself: elementwise and reduction PrimFuncs out of FuseTIR.

before::                                              after::

    for i, j: t[i, j] = sigmoid(x[i, j])                  blockIdx.x, threadIdx.x of ceil(n * 1536 / 1024), 256:
    for i, j: y[i, j] = x[i, j] * t[i, j] * u[i, j]           4 neighbours: y = x * sigmoid(x) * u

Elementwise producers are inlined. What is left of a function runs as one kernel a block: elementwise over a flat grid, with
vector loads where the innermost dimension allows; a reduction with one thread block for each result, whose threads reduce together.
An operator whose loops no schedule can see into (a scatter) runs on one thread: it is rare, small, and right.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.s_tir.schedule import ScheduleError

from llmc.targets.base import GpuTarget

Expr = Any
THREADS = 256
MAX_LANES = 4


def schedule(function: tirx.PrimFunc, target: GpuTarget) -> tirx.PrimFunc:
    """The PrimFunc with every statement under a block and a thread index."""
    if function.attrs.get("tirx.is_scheduled", False):
        return function
    if _binds_threads(function.body):  # TVM legalises scatters for GPUs with thread indices of their own
        return function.with_attr("tirx.is_scheduled", True)
    if not isinstance(function.body, s_tir.SBlockRealize) or function.body.block.name_hint != "root":
        return _one_thread(function)
    sch = s_tir.Schedule(function)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    if not blocks or any(not _visible(sch, block) for block in blocks):
        return _one_thread(function)
    _inline(sch)
    # TVM's code generators have no operators for vectors of truth values
    values = [*function.body.block.alloc_buffers, *function.params]  # a parameter that is a number has no dtype of a buffer
    lanes = 1 if any(str(getattr(value, "dtype", "")) == "bool" for value in values) else min(MAX_LANES, target.max_lanes)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_block(sch, block, lanes, target)
    return sch.mod["main"].with_attr("tirx.is_scheduled", True)


def _binds_threads(statement: Any) -> bool:
    """Whether a statement binds thread indices itself."""
    if isinstance(statement, tirx.AttrStmt):
        return bool(statement.attr_key == "thread_extent") or _binds_threads(statement.body)
    if isinstance(statement, s_tir.SBlockRealize):
        return _binds_threads(statement.block.body)
    return isinstance(statement, tirx.SeqStmt) and any(_binds_threads(part) for part in statement)


def _visible(sch: s_tir.Schedule, block: Any) -> bool:
    """Whether every loop around the block is one of its axes, so that iterations are independent or a plain reduction."""
    kinds = _kinds(sch, block)
    return len(sch.get_loops(block)) == len(kinds) and set(kinds) <= {0, 2}


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
        try:
            sch.compute_inline(block)
        except ScheduleError:
            # A block whose region is not the identity of its axes stays a kernel of its own: slower, and right.
            continue


def _schedule_block(sch: s_tir.Schedule, block: Any, lanes: int, target: GpuTarget) -> None:
    loops, kinds = sch.get_loops(block), _kinds(sch, block)
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 2]
    if reduced:
        _reduce(sch, block, spatial, reduced, target)
    else:
        _spread(sch, block, spatial, lanes, target)


def _spread(sch: s_tir.Schedule, block: Any, spatial: list[Any], lanes: int, target: GpuTarget) -> None:
    """An elementwise block over a flat grid, a thread for at most ``lanes`` neighbours."""
    if not spatial:
        one = sch.add_unit_loop(block)
        sch.bind(one, "threadIdx.x")
        return
    inner = sch.get(spatial[-1]).extent
    lanes = lanes if isinstance(inner, tirx.IntImm) else 1
    while lanes > 1 and int(inner) % lanes:
        lanes //= 2
    if lanes > 1:
        rest, vector = sch.split(spatial[-1], factors=[None, lanes])
        sch.vectorize(vector)
        spatial = [*spatial[:-1], rest]
    grid, thread = sch.split(sch.fuse(*spatial), factors=[None, min(THREADS, target.max_threads)])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def _reduce(sch: s_tir.Schedule, block: Any, spatial: list[Any], reduced: list[Any], target: GpuTarget) -> None:
    """A reduction: a thread block for each result."""
    sch.reorder(*spatial, *reduced)
    whole = sch.fuse(*reduced)
    _, thread = sch.split(whole, factors=[None, target.warp_size])
    sch.bind(thread, "threadIdx.x")
    grid = sch.fuse(*spatial) if spatial else sch.add_unit_loop(sch.get_loops(block)[0])
    sch.bind(grid, "blockIdx.x")


def _one_thread(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The body as it is, under one block of one thread."""
    body = function.body
    for tag in ("threadIdx.x", "blockIdx.x"):
        index = tirx.Var(tag.replace(".", "_"), "int32")
        axis = tirx.IterVar(Range(0, 1), index, tirx.IterVar.ThreadIndex, tag)
        body = tirx.AttrStmt(axis, "thread_extent", tirx.const(1, "int32"), body)
    return function.with_body(body).with_attr("tirx.is_scheduled", True)
