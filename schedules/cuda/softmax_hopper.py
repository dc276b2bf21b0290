"""Online softmax over the accumulators of a wgmma: scores stay in the registers in which ``S = QK'`` leaves them.

Thread ``t`` of a warpgroup holds, of a 64-row tile with ``2 * count`` columns, score i at row ``16 (t // 32) + t % 32 // 4 +
8 (i // 2 % 2)`` and column ``8 (i // 4) + 2 (t % 4) + i % 2``: two rows, each shared by four neighbouring threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda.hopper import LOG2E, exchange

Expr = Any
MASKED = -1e30
"""A score that no row keeps: finite, so that the difference of two masked maxima is a number."""


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
def accumulate(s: Any, count: Any, rules: Any, largest: Any, shift: Any, decay: Any, total: Any) -> None:
    """s becomes exp2(s - largest); one online step (Milakov & Gimelshein, 2018).

    For each of the thread's two rows: ``largest`` is the largest score so far, ``decay`` what earlier sums shrink by,
    ``total`` the sum over the thread's own columns; ``shift`` is scratch.
    """
    for r in T.unroll(2):
        shift[r] = largest[r]
    for i in T.unroll(count):
        shift[i // 2 % 2] = T.max(shift[i // 2 % 2], s[i])
    for r in T.unroll(2):
        shift[r] = T.max(shift[r], exchange(shift[r], 1))
        shift[r] = T.max(shift[r], exchange(shift[r], 2))
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
