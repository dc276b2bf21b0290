"""Rotary embedding written as arithmetic -> ``llmc.rope``.

before::                                                          after::

    q = permute_dims(q0, [1, 0, 2])              # [h, n, d]         y0 = llmc.rope(q0, cos, sin, rotary_dim=d)
    r = concat([-q[..., d/2:], q[..., :d/2]])                        y = permute_dims(y0, [1, 0, 2])
    y = add(multiply(q, cos), multiply(r, sin))

Found: both orders of every operand; halves, and pairs (``q[..., 1::2]``, ``q[..., 0::2]`` interleaved again); the form
``[a·cos - b·sin, b·cos + a·sin]`` over the halves a and b; partial rotation (a slice is rotated, then joined with the rest);
heads first, tokens first, or no head axis. The permutations that this leaves meet their inverses in ``simplify``.
What does not match stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.relax import op

from llmc.dialect.rope import rope
from llmc.passes.rewrite import Graph, Rewriter, op_name, rewrite
from llmc.passes.shapes import axis_slice, dims, plain, same_dim, same_shape, take_slice


@dataclass(frozen=True)
class _Part:
    """``base[..., begin:end:step]``"""

    base: relax.Expr
    begin: int
    end: int
    step: int

    @property
    def size(self) -> int:
        return -(-(self.end - self.begin) // self.step)

    def is_(self, base: relax.Expr, begin: int, size: int, step: int = 1) -> bool:
        return self.base.same_as(base) and (self.begin, self.size, self.step) == (begin, size, step)


@dataclass(frozen=True)
class _Rotation:
    """What was recognised: ``source`` in its own layout, cos and sin ``[n, r]``."""

    source: relax.Expr
    cos: relax.Expr
    sin: relax.Expr
    interleaved: bool


def _part(work: Rewriter, x: relax.Expr) -> _Part | None:
    """``x`` as a slice of the last axis of something, itself if it is none; None if that axis is not of known size."""
    size = dims(x)[-1]
    if not isinstance(size, int):
        return None
    value = work.value(x, "relax.strided_slice")
    found = None if value is None else axis_slice(value)
    if found is None or found[0] != len(dims(x)) - 1:
        return _Part(x, 0, size, 1)
    return _Part(value.args[0], *found[1:])


def _joined(work: Rewriter, x: relax.Expr) -> list[relax.Expr] | None:
    """The two tensors that are concatenated (or stacked) along the last axis to make ``x``; a stacked one without the new axis."""
    value = work.value(x)
    name = op_name(value)
    if name not in ("relax.concat", "relax.stack") or not isinstance(value.args[0], relax.Tuple):
        return None
    fields = list(value.args[0].fields)
    rank = len(dims(x))
    return fields if len(fields) == 2 and int(value.attrs.axis) % rank == rank - 1 else None


def _rotate(work: Rewriter, turned: relax.Expr, part: _Part) -> bool | None:
    """Whether ``turned`` is rotate(part): False for halves, True for pairs, None if it is neither."""
    half = part.size // 2
    joined = _joined(work, turned)
    if joined is not None:
        first, second = _negated(work, joined[0]), _part(work, joined[1])
        if first is not None and second is not None and first.is_(part.base, part.begin + half, half):
            return False if second.is_(part.base, part.begin, half) else None
        return None
    flat = work.value(turned, "relax.reshape")
    joined = None if flat is None else _joined(work, flat.args[0])
    if joined is None or plain(dims(flat.args[0])[-1]) != 2:
        return None
    if op_name(work.value(flat.args[0])) == "relax.concat":
        unit = [work.value(j, "relax.reshape") for j in joined]
        if any(u is None or dims(j)[-1] != 1 for u, j in zip(unit, joined, strict=True)):
            return None
        joined = [u.args[0] for u in unit if u is not None]
    first, second = _negated(work, joined[0]), _part(work, joined[1])
    if first is None or second is None:
        return None
    odd, even = first.is_(part.base, part.begin + 1, half, 2), second.is_(part.base, part.begin, half, 2)
    return True if odd and even else None


def _negated(work: Rewriter, x: relax.Expr) -> _Part | None:
    value = work.value(x, "relax.negative")
    return None if value is None else _part(work, value.args[0])


def _both_orders(call: relax.Call) -> Iterator[tuple[relax.Expr, relax.Expr]]:
    a, b = call.args
    yield a, b
    yield b, a


def _row_axis(x: relax.Expr, table: relax.Expr) -> int | None:
    """The axis of ``x`` that the rows of a cos or sin ``table`` run along when it is broadcast against ``x``; None if unclear."""
    shape, other = dims(x), dims(table)
    aligned: list[Any] = [1] * (len(shape) - len(other)) + other
    if len(other) > len(shape) or len(shape) not in (2, 3) or not same_dim(aligned[-1], shape[-1]):
        return None
    axes = [a for a in range(len(shape) - 1) if not (isinstance(aligned[a], int) and aligned[a] == 1)]
    return axes[0] if len(axes) == 1 and same_dim(aligned[axes[0]], shape[axes[0]]) else None


class _Ropes:
    """The rules; ``found`` remembers what each new variable rotates, for the partial form."""

    def __init__(self) -> None:
        self.found: dict[relax.Var, _Rotation] = {}

    def rule(self, work: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        name = op_name(value)
        if name == "relax.add":
            return self._sum(work, value)
        if name == "relax.concat" and isinstance(value.args[0], relax.Tuple) and len(value.args[0].fields) == 2:
            rank = len(dims(var))
            if int(value.attrs.axis) % rank == rank - 1:
                first, second = value.args[0].fields
                found = self._partial(work, first, second)
                return self._halves(work, first, second) if found is None else found
        return None

    def _sum(self, work: Rewriter, value: relax.Call) -> relax.Expr | None:
        """``x · cos + rotate(x) · sin``"""
        for straight, crossed in _both_orders(value):
            p, t = work.value(straight, "relax.multiply"), work.value(crossed, "relax.multiply")
            if p is None or t is None:
                return None
            for turned, sin in _both_orders(t):
                if op_name(work.value(turned)) not in ("relax.concat", "relax.reshape"):
                    continue
                for x, cos in _both_orders(p):
                    found = self._match(work, x, cos, turned, sin)
                    if found is not None:
                        return found
        return None

    def _match(self, work: Rewriter, x: relax.Expr, cos: relax.Expr, turned: relax.Expr, sin: relax.Expr) -> relax.Expr | None:
        part = _part(work, x)
        if part is None or part.step != 1 or part.size % 2 or not same_shape(dims(x), dims(turned)):
            return None
        interleaved = _rotate(work, turned, part)
        if interleaved is None or _row_axis(x, cos) is None or not same_shape(dims(cos), dims(sin)):
            return None
        return self._emit(work, x, cos, sin, interleaved, part.size)

    def _halves(self, work: Rewriter, first: relax.Expr, second: relax.Expr) -> relax.Expr | None:
        """``[a·cos - b·sin, b·cos + a·sin]`` with cos and sin of half the width."""
        minus, plus = work.value(first, "relax.subtract"), work.value(second, "relax.add")
        products = [] if minus is None or plus is None else [work.value(v, "relax.multiply") for v in (*minus.args, *plus.args)]
        if not products or any(p is None for p in products):
            return None
        for a, cos in _both_orders(products[0]):
            for b, sin in _both_orders(products[1]):
                if any(_is_product(products[i], b, cos) and _is_product(products[5 - i], a, sin) for i in (2, 3)):
                    found = self._join_halves(work, a, b, cos, sin)
                    if found is not None:
                        return found
        return None

    def _join_halves(self, work: Rewriter, a: relax.Expr, b: relax.Expr, cos: relax.Expr, sin: relax.Expr) -> relax.Expr | None:
        low, high = _part(work, a), _part(work, b)
        if low is None or high is None or low.step != 1 or not high.is_(low.base, low.end, low.size):
            return None
        if _row_axis(a, cos) is None or not same_shape(dims(cos), dims(sin)):
            return None
        size, rank = 2 * low.size, len(dims(low.base))
        x = low.base if dims(low.base)[-1] == size else work.emit(take_slice(low.base, rank - 1, low.begin, high.end))
        cos, sin = (work.emit(op.concat([t, t], axis=-1)) for t in (cos, sin))
        return self._emit(work, x, cos, sin, False, size)

    def _partial(self, work: Rewriter, rotated: relax.Expr, rest: relax.Expr) -> relax.Expr | None:
        """``[rope(x[..., :r]), x[..., r:]]`` -> ``rope(x)``"""
        found = self.found.get(rotated)
        if found is None:
            return None
        part, tail = _part(work, found.source), _part(work, rest)
        if part is None or tail is None or not tail.is_(part.base, part.end, tail.size):
            return None
        x, axis = part.base, len(dims(part.base)) - 1
        if (part.begin, tail.end) != (0, dims(x)[-1]):
            x = work.emit(take_slice(x, axis, part.begin, tail.end))
        return self._place(work, x, found, part.size)

    def _emit(
        self, work: Rewriter, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, interleaved: bool, rotary_dim: int
    ) -> relax.Expr:
        rows = dims(x)[_row_axis(x, cos) or 0]
        flat = [work.emit(op.reshape(t, [rows, rotary_dim])) for t in (cos, sin)]
        return self._place(work, x, _Rotation(x, flat[0], flat[1], interleaved), rotary_dim)

    def _place(self, work: Rewriter, x: relax.Expr, rotation: _Rotation, rotary_dim: int) -> relax.Expr:
        """``llmc.rope`` of ``x`` brought to ``[n, h, d]``, and the result brought back to the layout of ``x``."""
        shape, cos, sin = dims(x), rotation.cos, rotation.sin
        rows = dims(cos)[0]
        heads_first = len(shape) == 3 and not same_dim(shape[0], rows)
        if len(shape) == 2:
            x = work.emit(op.reshape(x, [shape[0], 1, shape[1]]))
        elif heads_first:
            x = work.emit(op.permute_dims(x, [1, 0, 2]))
        y = work.emit(rope(x, cos, sin, rotary_dim, rotation.interleaved))
        if len(shape) == 2:
            y = work.emit(op.reshape(y, shape))
        elif heads_first:
            y = work.emit(op.permute_dims(y, [1, 0, 2]))
        self.found[y] = rotation
        return y


def _is_product(product: relax.Call, a: relax.Expr, b: relax.Expr) -> bool:
    x, y = product.args
    return (x.same_as(a) and y.same_as(b)) or (x.same_as(b) and y.same_as(a))


def fuse_rope(graph: Graph) -> None:
    """Recognise the rotary embeddings of ``graph``."""
    rewrite(graph, _Ropes().rule)
