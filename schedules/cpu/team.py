"""A team of threads that runs a whole step: how work is handed out, and how one piece of it waits for the one before.

A *phase* is a loop whose iterations are independent. It is cut into as many ranges as there are threads. A phase's slot in memory
holds counters that are 0 at the start of a step: how many iterations are done, and how many of each range have been claimed. A
thread claims chunks of its own range, each with one atomic addition, then of the others' (work stealing: Blumofe & Leiserson,
1999), adds what it has run to what is done, waits until all is done, and goes on to the next phase. In its own range a thread
reads one stretch of memory: chunks dealt to all threads in turn would have each processor fetch ahead what the others need.

So a phase waits for work, never for a thread. A thread that the operating system has taken off its processor holds up
nobody unless it has claimed a chunk; when it comes back it finds everything claimed and catches up. A waiting thread spins for
some microseconds, then offers its processor at every turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import bind
from llmc.targets.base import Target

Expr = Any
LINE = 64
"""Bytes of a counter: a cache line of its own, so that threads at work on their own ranges do not disturb each other."""
RANGES = 8
"""Ranges of a phase at most; more threads share them."""
SLOT = LINE * (1 + RANGES)
"""Bytes of a phase's counters at most."""
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


@dataclass(frozen=True)
class Team:
    """The ``threads`` of a step and the ``rank`` of the one that runs this (int32; 0 .. threads - 1, in any order)."""

    threads: Expr
    rank: Expr

    @property
    def ranges(self) -> Expr:
        return tirx.min(self.threads, tirx.const(RANGES, "int32"))

    def slot(self, slots: Expr, index: int) -> Expr:
        """Slot number ``index`` behind ``slots``: they are no wider than this team needs."""
        return at(slots, tirx.Cast("int64", (self.ranges + 1) * (LINE * index)))


def share(slot: Expr, extent: Expr, team: Team, chunks: int, body: Callable[[Expr, Expr], None]) -> None:
    """Emit a phase over ``extent`` (int32) iterations: ``body(low, high)`` runs a chunk of them on one of the threads that come
    here, and behind the phase all of them are done. With more ``chunks`` for each thread the last to finish is late by less."""
    zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
    extent = bind(extent)
    ranges = bind(team.ranges)
    length = bind(tirx.floordiv(extent + ranges - 1, ranges))
    chunk = bind(tirx.max(tirx.floordiv(extent, team.threads * chunks), one))
    done, first = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "int32")
    T.buffer_store(done, zero, [0])
    with T.serial(zero, ranges) as turn:
        number = bind(tirx.floormod(team.rank + turn, ranges))
        counter = T.bind(at(slot, tirx.Cast("int64", (number + 1) * LINE)))
        low = bind(number * length)
        high = bind(tirx.min(low + length, extent))
        T.buffer_store(first, low + add(counter, chunk), [0])
        with T.While(first[0] < high):
            end = bind(tirx.min(first[0] + chunk, high))
            body(first[0], end)
            T.buffer_store(done, done[0] + (end - first[0]), [0])
            T.buffer_store(first, low + add(counter, chunk), [0])
    T.evaluate(add(slot, done[0]))
    T.evaluate(tirx.call_extern("int32", "llmc_team_wait", slot, extent))


def once(slot: Expr, body: Callable[[], None]) -> None:
    """Emit a phase of one piece: whichever thread comes first runs it, and the others wait."""
    one = tirx.const(1, "int32")
    with T.If(add(at(slot, LINE), one).equal(tirx.const(0, "int32"))), T.Then():
        body()
        T.evaluate(add(slot, one))
    T.evaluate(tirx.call_extern("int32", "llmc_team_wait", slot, one))
