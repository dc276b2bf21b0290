"""A kernel as a function that every thread of a team calls: see :mod:`llmc.schedules.cpu.team`.

before::                                         after::

    def linear(x, weight, out):                      def linear_team(x*, weight*, out*, codes*, n, slots*, threads, rank):
      codes = alloc([n * 576])                         share(slots[0], n, ...)          # each row on one thread
      for i in parallel(n): ...                        share(slots[1], 60, ...)
      for i in parallel(60): ...

Buffers become plain pointers, symbolic dimensions numbers, and memory that phases share is the caller's. A kernel without a loop
that is always parallel, where rows are few (what such a kernel does is over before another thread has woken up), or whose phases
depend on what it has computed, becomes a function that one thread calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T
from tvm_ffi.serialization import from_json_graph_str

from llmc.schedules.cpu import team
from llmc.targets.cpu_pipeline import DIRECT_CALL

Stmt = Any


@dataclass(frozen=True)
class TeamKernel:
    """``function``: its parameters are the pointers of ``buffers`` and of ``shared``, the numbers ``symbols`` and, if it has
    ``phases``, the first slot, the number of threads and the caller's rank; without, one thread calls it. ``shared``: workspaces
    of the caller."""

    name: str
    function: tirx.PrimFunc
    buffers: tuple[Any, ...]
    shared: tuple[Any, ...]
    symbols: tuple[Any, ...]
    phases: int | None


def team_kernel(name: str, kernel: tirx.PrimFunc, few_rows: bool, chunks: int) -> TeamKernel:
    """``kernel`` for a team, as ``name``. ``few_rows``: loops that are parallel for many rows only are not worth a team; ``chunks``
    of a loop for each thread."""
    phases = _phases(_statements(kernel.body), few_rows)
    # In both cases a copy: no two functions may share a variable. tvm.ir.load_json would write the text anew in Python first, in
    # case that it was another TVM's.
    copy = _serial(kernel) if phases is None else from_json_graph_str(tvm.ir.save_json(kernel))
    body = _statements(copy.body)
    shared = [] if phases is None else [s.buffer for s in body if isinstance(s, tirx.AllocBuffer)]
    buffers = [p for p in copy.params if tirx.is_buffer_var(p)]
    symbols = _symbols(buffers)
    builder = IRBuilder()
    with builder, T.prim_func(s_tir=True):
        T.func_name(name)
        # Not noalias: other threads write what this one reads, which no pointer of this function does.
        T.func_attr({"global_symbol": name, "calling_conv": DIRECT_CALL, "tirx.is_scheduled": True})
        T.func_ret(tvm.ir.PrimType("int32"))  # -1 where memory for a large local buffer is missing
        emitter = _Emitter(buffers, shared, symbols, phases, chunks)
        emitter.emit(body)
        T.add_to_parent(tirx.stmt.Return(tirx.const(0, "int32")))
    return TeamKernel(name, builder.get(), tuple(buffers), tuple(shared), tuple(symbols), phases)


class _Emitter:
    """Writes the function into the current builder."""

    def __init__(
        self, buffers: Sequence[Any], shared: Sequence[Any], symbols: Sequence[Any], phases: int | None, chunks: int
    ) -> None:
        pointers = [T.arg(f"p{i}", T.handle(str(b.ty.dtype))) for i, b in enumerate((*buffers, *shared))]
        for symbol in symbols:
            T.arg(str(symbol.name), symbol)
        if phases is not None:
            self.slots = T.arg("slots", T.handle("int32"))
            self.team = team.Team(T.arg("threads", T.int32()), T.arg("rank", T.int32()))
        self.phases, self.chunks, self.next = phases, chunks, 0
        for buffer, pointer in zip((*buffers, *shared), pointers, strict=True):
            T.add_to_parent(tirx.DeclBuffer(buffer, data=pointer))

    def emit(self, body: Sequence[Stmt]) -> None:
        if self.phases is None:
            for s in body:
                T.add_to_parent(s)
            return
        alone: list[Stmt] = []
        for s in body:
            if isinstance(s, tirx.AllocBuffer):
                continue
            if not (isinstance(s, tirx.Bind) or _has_parallel(s)):
                alone.append(s)
                continue
            self._once(alone)
            alone = []
            if isinstance(s, tirx.Bind):
                T.add_to_parent(s)
            elif isinstance(s, tirx.IfThenElse):
                self._branches(s)
            else:
                self._share(s)
        self._once(alone)

    def _slot(self) -> Any:
        self.next += 1
        return self.team.slot(self.slots, self.next - 1)

    def _once(self, statements: Sequence[Stmt]) -> None:
        def body() -> None:
            for s in statements:
                T.add_to_parent(s)

        if statements:
            team.once(self._slot(), body)

    def _branches(self, s: Any) -> None:
        with T.If(s.condition):
            with T.Then():
                self.emit(_statements(s.then_case))
            if s.else_case is not None:
                with T.Else():
                    self.emit(_statements(s.else_case))

    def _share(self, loop: Any) -> None:
        dtype = str(loop.loop_var.ty.dtype)

        def body(low: Any, high: Any) -> None:
            start, count = tirx.Cast(dtype, low), tirx.Cast(dtype, high - low)
            T.add_to_parent(tirx.For(loop.loop_var, start, count, tirx.stmt.ForKind.SERIAL, loop.body))

        team.share(self._slot(), tirx.Cast("int32", loop.extent), self.team, self.chunks, body)


def _statements(s: Stmt) -> list[Stmt]:
    return [part for each in s.seq for part in _statements(each)] if isinstance(s, tirx.SeqStmt) else [s]


def _is_parallel(s: Stmt) -> bool:
    return isinstance(s, tirx.For) and s.kind == tirx.stmt.ForKind.PARALLEL


def _has_parallel(s: Stmt) -> bool:
    """Whether ``s``, a loop or a choice, is or leads to a parallel loop."""
    if isinstance(s, tirx.IfThenElse):
        return any(_has_parallel(b) for b in (s.then_case, s.else_case) if b is not None)
    return any(_is_parallel(p) for p in _statements(s))


def _phases(body: Sequence[Stmt], few_rows: bool) -> int | None:
    """How many slots the statements need; None if they are for one thread."""
    if not any(_is_parallel(s) if few_rows else _has_parallel(s) for s in body):
        return None
    count = 0
    for s in body:
        if isinstance(s, tirx.IfThenElse) and _has_parallel(s):
            count += sum(_most_phases(b) for b in (s.then_case, s.else_case) if b is not None)
        elif not isinstance(s, tirx.Bind | tirx.AllocBuffer):
            count += 1
    return None if any(_loads(s) for s in body) else count


def _most_phases(branch: Stmt) -> int:
    return len(_statements(branch))


def _loads(s: Stmt) -> bool:
    """Whether what a thread does outside of phases depends on memory, which a late thread finds changed."""
    if isinstance(s, tirx.Bind):
        return _reads(s.value)
    if isinstance(s, tirx.IfThenElse) and _has_parallel(s):
        branches = [b for b in (s.then_case, s.else_case) if b is not None]
        return _reads(s.condition) or any(_loads(p) for b in branches for p in _statements(b))
    return _is_parallel(s) and (_reads(s.extent) or not _zero(s.min))


def _zero(value: Any) -> bool:
    return isinstance(value, tirx.IntImm) and int(value.value) == 0


def _reads(value: Any) -> bool:
    return any(node["type"] == "tirx.BufferLoad" for node in _nodes(value))


def _nodes(value: Any) -> list[dict[str, Any]]:
    return list(json.loads(tvm.ir.save_json(value))["nodes"])


def _symbols(buffers: Sequence[Any]) -> list[Any]:
    """The variables in the buffers' shapes, each once."""
    found: list[Any] = []
    for buffer in buffers:
        for dim in buffer.shape:
            for part in (dim, *(getattr(dim, side) for side in ("a", "b") if hasattr(dim, side))):
                if isinstance(part, tirx.Var) and not any(part.same_as(f) for f in found):
                    found.append(part)
    return found


def _serial(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """A copy of ``kernel`` with variables of its own and without parallel loops."""
    graph = json.loads(tvm.ir.save_json(kernel))
    for node in graph["nodes"]:
        if node["type"] == "tirx.For" and node["data"]["kind"] == int(tirx.stmt.ForKind.PARALLEL):
            node["data"]["kind"] = int(tirx.stmt.ForKind.SERIAL)
    return from_json_graph_str(json.dumps(graph))
