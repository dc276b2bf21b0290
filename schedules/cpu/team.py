"""A team of threads that runs a whole step: how work is handed out, and how one piece of it waits for the one before.

A *phase* is a loop whose iterations are independent. Its slot in memory holds two counters, both 0 at the start of a step:
how many iterations have been claimed, and how many are done. A thread claims a chunk with one atomic addition, runs it, and adds
it to what is done; where nothing is left to claim it waits until all is done, and goes on to the next phase.

So a phase waits for work, never for a thread. A thread that the operating system has taken off its processor holds up
nobody unless it is inside a chunk; when it comes back it finds everything claimed and catches up. A waiting thread spins for
some microseconds, then offers its processor at every turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import bind
from llmc.targets.base import Target

Expr = Any
SLOT = 64
"""Bytes of a phase's counters: a cache line."""
SPINS = 4000

_PAUSE = {"x86_64": "declare void @llvm.x86.sse2.pause()", "aarch64": "declare void @llvm.aarch64.hint(i32)"}
_PAUSED = {"x86_64": "call void @llvm.x86.sse2.pause()", "aarch64": "call void @llvm.aarch64.hint(i32 1)"}


def has_team(target: Target) -> bool:
    """Whether the target has the means: a CPU whose pause instruction is known, and POSIX threads."""
    machine = target.triple.partition("-")[0]
    return target.kind == "cpu" and machine in _PAUSE and ("linux" in target.triple or "android" in target.triple)


def intrinsics(target: Target) -> str:
    """LLVM IR of the two functions that TIR has no words for: an atomic addition, and waiting for a counter."""
    machine = target.triple.partition("-")[0]
    return f"""
{_PAUSE[machine]}
declare i32 @sched_yield()

define linkonce_odr hidden i32 @llmc_team_add(ptr %counter, i32 %value) alwaysinline {{
  %old = atomicrmw add ptr %counter, i32 %value acq_rel
  ret i32 %old
}}

define linkonce_odr hidden i32 @llmc_team_wait(ptr %counter, i32 %value) noinline {{
entry:
  br label %look
look:
  %turn = phi i32 [ 0, %entry ], [ %next, %again ]
  %now = load atomic i32, ptr %counter acquire, align 4
  %reached = icmp sge i32 %now, %value
  br i1 %reached, label %done, label %pause
pause:
  {_PAUSED[machine]}
  %next = add nuw i32 %turn, 1
  %patient = icmp ult i32 %next, {SPINS}
  br i1 %patient, label %again, label %yield
yield:
  %ignored = call i32 @sched_yield()
  br label %again
again:
  br label %look
done:
  ret i32 0
}}
"""


def at(pointer: Expr, offset: int | Expr) -> Expr:
    """``pointer`` moved by ``offset`` bytes."""
    offset = tirx.const(offset, "int64") if isinstance(offset, int) else offset
    return tirx.call_intrin("handle", "tirx.handle_add_byte_offset", pointer, offset)


def add(counter: Expr, value: Expr) -> Expr:
    """Add to an int32 counter atomically; the value before."""
    return tirx.call_extern("int32", "llmc_team_add", counter, value)


def share(slot: Expr, extent: Expr, threads: Expr, chunks: int, body: Callable[[Expr, Expr], None]) -> None:
    """Emit a phase over ``extent`` (int32) iterations: ``body(low, high)`` runs a chunk of them on one of the threads that come
    here, and behind the phase all of them are done. With more ``chunks`` for each thread the last to finish is late by less."""
    extent = bind(extent)
    chunk = bind(tirx.max(tirx.floordiv(extent, threads * chunks), tirx.const(1, "int32")))
    first = T.alloc_buffer((1,), "int32")
    T.buffer_store(first, add(slot, chunk), [0])
    with T.While(first[0] < extent):
        end = bind(tirx.min(first[0] + chunk, extent))
        body(first[0], end)
        T.evaluate(add(at(slot, 4), end - first[0]))
        T.buffer_store(first, add(slot, chunk), [0])
    T.evaluate(tirx.call_extern("int32", "llmc_team_wait", at(slot, 4), extent))


def once(slot: Expr, body: Callable[[], None]) -> None:
    """Emit a phase of one piece: whichever thread comes first runs it, and the others wait."""
    one = tirx.const(1, "int32")
    with T.If(add(slot, one).equal(tirx.const(0, "int32"))), T.Then():
        body()
        T.evaluate(add(at(slot, 4), one))
    T.evaluate(tirx.call_extern("int32", "llmc_team_wait", at(slot, 4), one))
