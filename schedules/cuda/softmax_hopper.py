"""Online softmax over the accumulators of a wgmma: scores stay in the registers in which ``S = QK'`` leaves them.

Thread ``t`` of a warpgroup holds, of a 64-row tile with ``2 * count`` columns, score i at row ``16 (t // 32) + t % 32 // 4 +
8 (i // 2 % 2)`` and column ``8 (i // 4) + 2 (t % 4) + i % 2``: two rows, each shared by four neighbouring threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda.hopper import FULL_WARP, LOG2E, exchange

Expr = Any
MASKED = -1e30
"""A score that no row keeps: finite, so that the difference of two masked maxima is a number."""

SLACK = 8.0
"""How far a score may pass the largest so far, in powers of two, before sums are rescaled: dividing by the sum of the weights makes
up for any common factor, and 2 ** 8 times as many positions as a context has are within the range of float32."""


@dataclass(frozen=True)
class Rules:
    """What happens to a score before the softmax; the fields are the attributes of ``llmc.attend``."""

    scale: float
    softcap: float
    window: int
    chunk: int

    @property
    def capped(self) -> bool:
        return self.softcap != 0.0

    @property
    def bounded(self) -> bool:
        """Whether a row sees less than all positions up to its own."""
        return self.window > 0 or self.chunk > 0

    @property
    def to_log2(self) -> float:
        """Factor from a score as kept to an exponent of two: scores stay unscaled, unless capping has scaled them."""
        return LOG2E if self.capped else self.scale * LOG2E

    def first_visible(self, position: Expr) -> Expr:
        """The first position that a row at ``position`` may look at."""
        low = T.max(position - (self.window - 1), 0) if self.window > 0 else T.int32(0)
        return T.max(low, position // self.chunk * self.chunk) if self.chunk > 0 else low

    def visible(self, column: Expr, position: Expr) -> Expr:
        return T.And(column <= position, column >= self.first_visible(position)) if self.bounded else column <= position

    def may_hide(self, first_column: Expr, columns: int, first_position: Expr, rows: int) -> Expr:
        """Whether a tile of ``columns`` may hold a position that one of ``rows`` rows must not see."""
        after = first_column + columns > first_position + 1
        return T.Or(after, first_column < self.first_visible(first_position + (rows - 1))) if self.bounded else after


@T.inline
def cap(s: Any, count: Any, rules: Any) -> None:
    """softcap * tanh(z), z = s * scale / softcap, with tanh(z) = 1 - 2 / (1 + exp(2z))."""
    for i in T.unroll(count):
        T.ptx["ex2.approx.ftz.f32"](s[i], s[i] * T.float32(2 * rules.scale * LOG2E / rules.softcap))
        T.ptx["rcp.approx.ftz.f32"](s[i], s[i] + T.float32(1))
        s[i] = T.float32(rules.softcap) - s[i] * T.float32(2 * rules.softcap)


@T.inline
def mask(s: Any, count: Any, rules: Any, first_column: Any, first_position: Any, span: Any, positions: Any, lane: Any) -> None:
    """Hide what the rows must not see: those of the tile are at ``span`` positions from ``first_position`` on, the thread's two
    at ``positions``.
    """
    if rules.may_hide(first_column, count * 2, first_position, span):
        for i in T.unroll(count):
            column = T.meta_var(first_column + i // 4 * 8 + lane % 4 * 2 + i % 2)
            s[i] = T.if_then_else(rules.visible(column, positions[i // 2 % 2]), s[i], T.float32(MASKED))


@T.inline
def accumulate(s: Any, count: Any, rules: Any, largest: Any, shift: Any, decay: Any, total: Any, lazy: Any) -> None:
    """s becomes exp2(s - largest); one online step (Milakov & Gimelshein, 2018).

    For each of the thread's two rows: ``largest`` is the largest score so far, ``decay`` what earlier sums shrink by,
    ``total`` the sum over the thread's own columns; ``shift`` is scratch. ``lazy``: ``largest`` stays as long as no weight passes
    2 ** :data:`SLACK`, and ``decay`` is 1 then.
    """
    for r in T.unroll(2):
        shift[r] = largest[r]
    for i in T.unroll(count):
        shift[i // 2 % 2] = T.max(shift[i // 2 % 2], s[i])
    for r in T.unroll(2):
        shift[r] = T.max(shift[r], exchange(shift[r], 1))
        shift[r] = T.max(shift[r], exchange(shift[r], 2))
        if lazy:
            grown = T.meta_var((shift[r] - largest[r]) * T.float32(rules.to_log2))
            shift[r] = T.if_then_else(grown > T.float32(SLACK), shift[r], largest[r])
        T.ptx["ex2.approx.ftz.f32"](decay[r], (largest[r] - shift[r]) * T.float32(rules.to_log2))
        largest[r] = shift[r]
        # A row that sees nothing of its tiles so far gets no weights. Its score times the factor, less the rounded product, would
        # not be zero in one fused operation but the rounding of 1e30: an infinite weight, or none, by the factor.
        shift[r] = T.if_then_else(shift[r] > T.float32(MASKED), shift[r] * T.float32(rules.to_log2), T.float32(0))
        total[r] = total[r] * decay[r]
    for i in T.unroll(count):
        T.ptx["ex2.approx.ftz.f32"](s[i], s[i] * T.float32(rules.to_log2) - shift[i // 2 % 2])
    for i in T.unroll(count):
        total[i // 2 % 2] = total[i // 2 % 2] + s[i]


@T.inline
def rescale(o: Any, count: Any, decay: Any, lazy: Any) -> None:
    """Earlier sums shrink by ``decay``. ``lazy``: not where it is 1 in a whole warp, as in most tiles behind the first few."""
    if lazy:
        if T.cuda.any_sync(T.uint32(FULL_WARP), T.Or(decay[0] != T.float32(1), decay[1] != T.float32(1))) != 0:
            for i in T.unroll(count):
                o[i] = o[i] * decay[i // 2 % 2]
    else:
        for i in T.unroll(count):
            o[i] = o[i] * decay[i // 2 % 2]


@T.inline
def reciprocals(total: Any, largest: Any, scratch: Any, rules: Any, sinks: Any, first_head: Any, own_row: Any, packed: Any) -> None:
    """total[r] becomes one over the sum of its row's weights. ``sinks`` of the heads, or None; a row is a token's head, of
    ``packed`` heads from ``first_head`` on, and the thread's are ``own_row`` and 8 more.
    """
    for r in T.unroll(2):
        total[r] = total[r] + exchange(total[r], 1)
        total[r] = total[r] + exchange(total[r], 2)
        if sinks is not None:
            # A sink is one more score without a value. Far above all scores it makes the sum infinite, the result 0.
            T.ptx["ex2.approx.ftz.f32"](
                scratch[r],
                T.cast(sinks[first_head + (own_row + 8 * r) % packed], "float32") * T.float32(LOG2E)
                - largest[r] * T.float32(rules.to_log2),
            )
            total[r] = total[r] + scratch[r]
        total[r] = T.float32(1) / total[r]
