"""Rotation and append inside the decode attention kernels: what turns ``llmc.attend`` into ``llmc.rope_attend``.

The kernels read a sequence's row of the merged projection instead of its queries. A warp takes a *vector*, a head of the row: lanes
load words of two elements such that what turns together is in one lane, normalise it if asked, rotate it in float32 and put it into
shared memory, rounded once. So the queries of a group are turned by every block or warp that uses them, which costs less than a
hand-over. The key and the value are for the one that has the newest chunk: it also writes them to their slot of the page, and what
it read there before is replaced by them. No kernel of a step but this one writes to a layer's pages, so that all reads of pages may
begin before ``griddepcontrol.wait``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.script import tirx as T

from llmc.dialect.rope_append import key_dim
from llmc.dialect.rope_attend import INPUTS, OP, STATE
from llmc.schedules.cuda import hopper
from llmc.schedules.protocol import KernelCall, TensorSpec

Expr = Any
Parameter = Any
PAD = 8
"""Elements between two vectors in shared memory, that rows of a fragment lie in different banks."""

ROTATION = ("heads", "rotary_dim", "interleaved", "norm", "eps", "offset")
"""Attributes that attention has not."""


def attend_call(call: KernelCall) -> KernelCall:
    """The attention in a call of ``llmc.rope_attend``: as if its queries came rotated. Any other call as it is."""
    if call.op != OP:
        return call
    qkv, pages, dv = call.args[0], call.args[4], int(call.attr("v_dim"))
    heads = int(call.attr("heads"))
    d = key_dim(int(qkv.shape[1]), heads, int(pages.shape[1]), dv)
    sinks = call.args[INPUTS + STATE + 2 * int(call.attr("norm")) :]
    args = (TensorSpec((qkv.shape[0], heads, d), qkv.dtype), pages, *call.args[INPUTS : INPUTS + STATE], *sinks)
    attrs = tuple((name, value) for name, value in call.attrs if name not in ROTATION)
    return replace(call, op="llmc.attend", args=args, attrs=attrs)


def takes(call: KernelCall) -> bool:
    """Whether rows, tables and norm weights of a call of ``llmc.rope_attend`` are such as :class:`Rotation` reads."""
    qkv, cos, sin, slots, _ = call.args[:INPUTS]
    r, norms = int(call.attr("rotary_dim")), call.args[INPUTS + STATE :][: 2 * int(call.attr("norm"))]
    floats = [cos.dtype, sin.dtype, *(w.dtype for w in norms)]
    if call.attr("kv_scheme") or not isinstance(qkv.shape[1], int) or slots.dtype != "int32":
        return False
    return all(dtype in ("float32", *hopper.PTX_TYPE) for dtype in floats) and r % (2 if call.attr("interleaved") else 4) == 0


class Operands:
    """What the kernels of both kinds of calls read but the pages, which lie in them as each likes: ``match`` is for their head.

    ``match(q_ptr, qkv_ptr, .., sinks_ptr, b, rows, max_pages)``: the buffers of the parameters in this order, for ``b`` sequences
    with as many ``rows`` and up to ``max_pages`` pages each. ``starts`` is 0, 1, .. b in this phase.
    """

    def __init__(self, call: KernelCall, rotation: Rotation) -> None:
        attention = attend_call(call)
        hq, d = (int(v) for v in attention.args[0].shape[1:])
        dtype = attention.args[0].dtype
        sink_dtype = attention.args[STATE + 2].dtype if attention.attr("sinks") else dtype

        def match(
            q: Parameter, qkv: Parameter, cos: Parameter, sin: Parameter, slots: Parameter, table: Parameter, lens: Parameter,
            starts: Parameter, q_weight: Parameter, k_weight: Parameter, sinks: Parameter, b: Expr, rows: Expr, max_pages: Expr,
        ) -> tuple[Expr, ...]:  # fmt: skip
            angles = (rows, rotation.table_width), rotation.table_dtype
            return (
                T.match_buffer(q, (rows, hq, d), dtype, align=16),
                T.match_buffer(qkv, (rows, rotation.width), dtype, align=16),
                T.match_buffer(cos, *angles, align=16),
                T.match_buffer(sin, *angles, align=16),
                T.match_buffer(slots, (rows,), "int32", align=4),
                T.match_buffer(table, (b, max_pages), "int32", align=4),
                T.match_buffer(lens, (b,), "int32", align=4),
                T.match_buffer(starts, (b + 1,), "int32", align=4),
                T.match_buffer(q_weight, (d,), rotation.norm_dtypes[0], align=4),
                T.match_buffer(k_weight, (d,), rotation.norm_dtypes[1], align=4),
                T.match_buffer(sinks, (hq,), sink_dtype, align=4),
            )

        self.match = match


class Rotation:
    """Device code for a kernel of ``call``; of any call but ``llmc.rope_attend`` nothing (``here`` is False).

    ``vectors``: the queries of a group, a key and a value, which ``rows`` [.., vectors, stride] in shared memory holds.
    ``unused``: operands that a kernel with room for both kinds of calls does not have. ``gains``: registers for norm weights.
    """

    def __init__(self, call: KernelCall) -> None:
        inner = attend_call(call)
        hq, d = (int(v) for v in inner.args[0].shape[1:])
        hk, dv, page_size = int(inner.args[1].shape[1]), int(call.attr("v_dim")), int(call.attr("page_size"))
        self.here = call.op == OP
        group = hq // hk
        norm, pairs, r = bool(call.attr("norm")), bool(call.attr("interleaved")), int(call.attr("rotary_dim", d))
        eps, offset = float(call.attr("eps", 0.0)), float(call.attr("offset", 0.0))
        dtype = inner.args[0].dtype
        to_pair = hopper.packed_convert(dtype)
        self.vectors, self.stride, self.width = group + 2, max(d, dv) + PAD, hq * d + hk * (d + dv)
        self.table_dtype, self.table_width = (call.args[1].dtype, r) if self.here else (dtype, r)
        self.norm_dtypes = [spec.dtype for spec in call.args[INPUTS + STATE :][:2]] if self.here and norm else [dtype] * 2
        fused = {"qkv", "cos", "sin", "slots"}
        self.unused = ({"q"} if self.here else fused) | (set() if norm else {"q_weight", "k_weight"})

        # What turns together: words of both halves, or one word of a pair.
        together = 1 if pairs else 2
        turning, passing = r // 2 // together, (d - r) // 2
        pieces, passes = -(-turning // 32), -(-passing // 32)
        turned = pieces * together
        key_words, value_words = turned + passes, -(-dv // 64)
        words = max(key_words, value_words)
        self.gains = 4 * key_words if norm else 1

        def place(lane: Expr, w: Expr) -> Expr:
            """The element of a head at which word ``w`` of a lane begins, of those that turn."""
            return (lane + w // together * 32) * 2 + w % together * (r // 2)

        def passed(lane: Expr, w: Expr) -> Expr:
            """The same of those that pass."""
            return r + (lane + w * 32) * 2

        def element(held: Expr, i: Expr) -> Expr:
            """The i-th 16-bit value of some registers, float32."""
            half = T.cast(T.shift_right(held[i // 2], T.uint32(16) * T.cast(i % 2, "uint32")), "uint16")
            return T.cast(T.reinterpret(dtype, half), "float32")

        def is_key(v: Expr, newest: Expr) -> Expr:
            return T.And(newest, v == group)

        @T.inline
        def load_gains(gains: Expr, q_weight: Expr, k_weight: Expr, lane: Expr) -> None:
            """Norm weights, which no kernel writes: before the wait."""
            for i in T.unroll(self.gains):
                gains[i] = T.float32(0)
            if norm:
                for e in T.unroll(2):
                    for w in T.unroll(turned):
                        if lane + w // together * 32 < turning:
                            gains[w * 2 + e] = T.cast(q_weight[place(lane, w) + e], "float32")
                            gains[(key_words + w) * 2 + e] = T.cast(k_weight[place(lane, w) + e], "float32")
                    for w in T.unroll(passes):
                        if lane + w * 32 < passing:
                            gains[(turned + w) * 2 + e] = T.cast(q_weight[passed(lane, w) + e], "float32")
                            gains[(key_words + turned + w) * 2 + e] = T.cast(k_weight[passed(lane, w) + e], "float32")

        @T.inline
        def turn(
            qkv: Expr, cos: Expr, sin: Expr, gains: Expr, pages: Expr, rows: Expr, own: Expr, sequence: Expr, head: Expr,
            first: Expr, step: Expr, rounds: Expr, lane: Expr, newest: Expr, slot: Expr,
        ) -> None:  # fmt: skip
            """Vectors ``first + i * step`` for i below ``rounds`` to ``rows[own]``; the key and the value only if ``newest``, and
            to the page of ``slot`` if that is none of -1. A whole warp, at once."""
            held = T.alloc_local((rounds * words,), "uint32")
            angles = T.alloc_local((turned * 4,), "float32")  # of each word cos, cos, sin, sin
            x = T.alloc_local((key_words * 2,), "float32")
            result = T.alloc_local((1,), "uint32")
            page: T.int64 = T.cast(T.max(slot, 0) // page_size, "int64")
            at: T.int32 = T.max(slot, 0) % page_size

            @T.inline
            def keep(v: Expr, word: Expr, e: Expr) -> None:
                T.ptx["st.shared.b32"](rows.ptr_to([own, v, e]), word)
                if v >= group and slot >= 0:
                    start = T.meta_var(T.if_then_else(v == group, at * d, page_size * d + at * dv))
                    T.ptx["st.global.b32"](pages.ptr_to([page, head, start + e]), word)

            for i in T.unroll(rounds):
                v = T.meta_var(first + i * step)
                for w in T.unroll(words):
                    held[i * words + w] = T.uint32(0)
                if v < group or is_key(v, newest):
                    column = T.meta_var(T.if_then_else(v < group, head * group + v, hq + head) * d)
                    for w in T.unroll(turned):
                        if lane + w // together * 32 < turning:
                            T.ptx["ld.global.b32"](held[i * words + w], qkv.ptr_to([sequence, column + place(lane, w)]))
                    for w in T.unroll(passes):
                        if lane + w * 32 < passing:
                            T.ptx["ld.global.b32"](held[i * words + turned + w], qkv.ptr_to([sequence, column + passed(lane, w)]))
                if v == group + 1 and newest:
                    for w in T.unroll(value_words):
                        if (lane + w * 32) * 2 < dv:
                            T.ptx["ld.global.b32"](
                                held[i * words + w], qkv.ptr_to([sequence, (hq + hk) * d + head * dv + (lane + w * 32) * 2])
                            )
            for w in T.unroll(turned):
                for e in T.unroll(2):
                    angles[w * 4 + e] = T.float32(0)
                    angles[w * 4 + 2 + e] = T.float32(0)
                if lane + w // together * 32 < turning:
                    if self.table_dtype == "float32":
                        T.ptx["ld.global.v2.f32"](angles[w * 4], angles[w * 4 + 1], cos.ptr_to([sequence, place(lane, w)]))
                        T.ptx["ld.global.v2.f32"](angles[w * 4 + 2], angles[w * 4 + 3], sin.ptr_to([sequence, place(lane, w)]))
                    else:
                        for e in T.unroll(2):
                            angles[w * 4 + e] = T.cast(cos[sequence, place(lane, w) + e], "float32")
                            angles[w * 4 + 2 + e] = T.cast(sin[sequence, place(lane, w) + e], "float32")

            for i in T.unroll(rounds):
                v = T.meta_var(first + i * step)
                if v < group or is_key(v, newest):
                    for w in T.unroll(key_words * 2):
                        x[w] = element(held, i * words * 2 + w)
                    if norm:
                        total: T.float32 = T.float32(0)
                        for w in T.unroll(key_words * 2):
                            total = total + x[w] * x[w]
                        for s in T.unroll(5):
                            total = total + hopper.exchange(total, 16 >> s)
                        T.ptx["rsqrt.approx.ftz.f32"](total, total * T.float32(1.0 / d) + T.float32(eps))
                        for w in T.unroll(key_words * 2):
                            gain = T.meta_var(T.Select(v < group, gains[w], gains[key_words * 2 + w]))
                            x[w] = x[w] * total * (gain + T.float32(offset))
                    for w in T.unroll(turned):
                        if lane + w // together * 32 < turning:
                            even, odd = T.meta_var(w * 2), T.meta_var(w * 2 + 1)
                            if pairs:
                                T.ptx[to_pair](
                                    result[0], x[odd] * angles[w * 4 + 1] + x[even] * angles[w * 4 + 3],
                                    x[even] * angles[w * 4] - x[odd] * angles[w * 4 + 2],
                                )  # fmt: skip
                            else:
                                # The other half's word, against the sine in the first half.
                                other = T.meta_var(w // 2 * 4 + (1 - w % 2) * 2)
                                sign = T.meta_var(T.Select(w % 2 == 0, T.float32(-1), T.float32(1)))
                                T.ptx[to_pair](
                                    result[0], x[odd] * angles[w * 4 + 1] + x[other + 1] * (sign * angles[w * 4 + 3]),
                                    x[even] * angles[w * 4] + x[other] * (sign * angles[w * 4 + 2]),
                                )  # fmt: skip
                            keep(v, result[0], place(lane, w))
                    for w in T.unroll(passes):
                        if lane + w * 32 < passing:
                            T.ptx[to_pair](result[0], x[(turned + w) * 2 + 1], x[(turned + w) * 2])
                            keep(v, result[0], passed(lane, w))
                if v == group + 1 and newest:
                    for w in T.unroll(value_words):
                        if (lane + w * 32) * 2 < dv:
                            keep(v, held[i * words + w], (lane + w * 32) * 2)

        self.load_gains, self.turn = load_gains, turn
