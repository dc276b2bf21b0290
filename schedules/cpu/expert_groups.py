"""What the CPU kernels of experts share: (token, expert) pairs grouped by expert, and the gate between the two projections.

A *pair* is row · top_k + j: the j-th expert of a row.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import Simd, bind, f32, i64, local, read, store
from llmc.schedules.cpu.math import Math
from llmc.schedules.protocol import KernelCall

Expr = Any


class Groups:
    """The pairs in the order of their experts. ``emit`` sorts; ``order`` int64 [n · top_k] then holds the pairs."""

    def __init__(self, ids: Expr, n: Expr, top_k: int, experts: int) -> None:
        self.ids, self.pairs, self.top_k, self.experts = ids, n * top_k, top_k, experts
        self.order = T.alloc_buffer((n * top_k,), "int64")
        self._ends = local(1, experts, "int64")

    def emit(self) -> None:
        """A counting sort; afterwards _ends[e] is one past the last pair of expert e."""
        ends, expert = self._ends, local(1, dtype="int64")

        def expert_of(p: Expr) -> Expr:
            return i64(self.ids[tirx.floordiv(p, self.top_k), tirx.floormod(p, self.top_k)])

        with T.serial(0, self.experts) as e:
            store(ends, i64(0), i64(e))
        with T.serial(0, self.pairs) as p:
            store(expert, expert_of(i64(p)), 0)
            store(ends, read(ends, read(expert, 0)) + 1, read(expert, 0))
        with T.serial(1, self.experts) as e:
            store(ends, read(ends, i64(e)) + read(ends, i64(e) - 1), i64(e))
        # From the back: ends moves down to the starts and is moved up again afterwards, so the sort needs no second array.
        with T.serial(0, self.pairs) as p:
            at = bind(self.pairs - 1 - i64(p))
            store(expert, expert_of(at), 0)
            store(ends, read(ends, read(expert, 0)) - 1, read(expert, 0))
            store(self.order, at, read(ends, read(expert, 0)))
        with T.serial(0, self.experts - 1) as e:
            store(ends, read(ends, i64(e) + 1), i64(e))
        store(ends, self.pairs, i64(self.experts - 1))

    def range(self, expert: Expr) -> tuple[Expr, Expr]:
        """The places in ``order`` of an expert's pairs: first, one past the last."""
        end = bind(read(self._ends, expert))
        return bind(tirx.Select(expert > 0, read(self._ends, tirx.max(expert - 1, i64(0))), i64(0))), end


def gated(simd: Simd, call: KernelCall, gate: Expr, up: Expr | None, lanes: int) -> Expr:
    """act(alpha · gate) / alpha * (up + offset), clipped first if there is a limit."""

    def splat(value: float) -> Expr:
        return simd.splat(f32(value), lanes)

    alpha, limit, offset = (float(call.attr(name)) for name in ("alpha", "limit", "offset"))
    if limit > 0:
        gate = bind(tirx.min(gate, splat(limit)))
    if alpha != 1:
        gate = bind(gate * splat(alpha))
    value = Math(simd, lanes).activate(call.attr("activation"), gate)
    if alpha != 1:
        value = bind(value * splat(1 / alpha))
    if up is None:
        return value
    if limit > 0:
        up = bind(tirx.max(tirx.min(up, splat(limit)), splat(-limit)))
    if offset != 0:
        up = bind(up + splat(offset))
    return bind(value * up)
