"""``llmc.quantized_moe`` on any GPU: experts' matrices in the layout :mod:`.layout_mma`, codes read in 16-byte loads.

A *pair* is row * top_k + j. Three kernels: gate and up of every pair, with the gate applied; down; the sum of a row's experts, in
the order of its ``ids``. In the decode phase a block of threads computes a tile of one pair (:mod:`.quantized_tile`). In extend the
pairs are first sorted by expert, and a block reads a tile of one expert for several of its pairs at a time. Only routed experts are
read, and a row has the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.dialect.quantized_moe import OP, STACKS
from llmc.schedules import quantized_experts
from llmc.schedules.gpu import layout_mma
from llmc.schedules.gpu.emit import (
    STORAGE,
    Symbols,
    arguments,
    bind,
    ceildiv,
    each,
    flat,
    function,
    i64,
    launch,
    load,
    read,
    registers,
    shared,
    store,
    store_all,
    sync,
    when,
)
from llmc.schedules.gpu.layout_mma import LANES, ROWS
from llmc.schedules.gpu.math import ACTIVATIONS
from llmc.schedules.gpu.moe import gated
from llmc.schedules.gpu.operand import Floats
from llmc.schedules.gpu.quantized_tile import TileProducts, groups_that_fit, padded
from llmc.schedules.gpu.quantized_units import Units
from llmc.schedules.protocol import KernelCall
from llmc.schedules.quantized_experts import Of
from llmc.targets.base import GpuTarget, Target

Expr = Any
Write = Callable[[Expr, Expr, list[Expr]], None]
NAME = "gpu.quantized_moe"
LAYOUTS = (layout_mma,)
SORTING_THREADS = 128


def _call(
    h: int, i: int, experts: int, top_k: int, up: str, down: str, dtype: str = "bfloat16", phase: str = "decode", **attrs: Any
) -> KernelCall:
    return quantized_experts.sample(h, i, experts, top_k, up, down, lambda _: layout_mma, dtype, phase, **attrs)


SHAPES: dict[str, KernelCall] = {
    "two_of_eight_64x96_int4": _call(64, 96, 8, 2, "int4_g32", "int4_g32"),
    "extend_two_of_eight_64x96_int4": _call(64, 96, 8, 2, "int4_g32", "int4_g32", phase="extend"),
    "extend_136x72_int8_fp8": _call(136, 72, 5, 2, "int8", "fp8_e4m3", "float16", "extend", activation="gelu_tanh", bias=1),
    "odd_57x19_q4_1_f32": _call(57, 19, 5, 3, "q4_1", "int4p_g32", "float32", activation="gelu"),
    "clipped_interleaved_40x22_int8": _call(
        40, 22, 4, 2, "int8", "int8", "float16", interleave=1, bias=1, alpha=1.702, limit=0.5, offset=1.0
    ),
    "extend_plain_32x13_zero_points": _call(32, 13, 3, 1, "int4p_g32", "int3_g32", phase="extend", gated=0, activation="relu2"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not isinstance(target, GpuTarget) or call.attr("activation") not in ACTIVATIONS:
        return None
    if call.attr("activations") != "compute" or any(quantized_experts.layout_of(call, s, LAYOUTS) is None for s in STACKS):
        return None
    specs = dict(zip(quantized_experts.operand_names(call, LAYOUTS), (*call.args, call.result), strict=True))
    if specs["ids"].dtype != "int32" or any(s.dtype not in STORAGE for n, s in specs.items() if n != "ids" and "." not in n):
        return None
    schemes = " and ".join(str(call.attr(f"{stack}_scheme")) for stack in STACKS)
    how = "each pair's experts" if call.phase == "decode" else "pairs sorted by expert"
    return f"{how}, {schemes} codes in 16-byte loads"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``groups`` of 32 threads that share a tile's columns; in extend ``rows``: pairs for which codes are read once."""
    assert isinstance(target, GpuTarget)
    return {"groups": groups_that_fit(target)} | ({} if call.phase == "decode" else {"rows": [4, 2, 8]})


def build(call: KernelCall, target: GpuTarget, config: dict[str, Any]) -> Any:
    symbols, names = Symbols(), quantized_experts.operand_names(call, LAYOUTS)
    with function(f"quantized_moe_{call.attr('experts')}x{call.attr('hidden')}") as done:
        buffers = dict(zip(names, arguments(symbols, **dict(zip(names, (*call.args, call.result), strict=True))), strict=True))
        _Moe(call, target, buffers, symbols.dim(call.args[0].shape[0]), config).emit()
    return done()


class _Moe:
    """Emits the kernels."""

    def __init__(self, call: KernelCall, target: GpuTarget, buffers: dict[str, Expr], n: Expr, config: dict[str, Any]) -> None:
        self.call, self.target, self.buffers = call, target, buffers
        self.experts, self.hidden, self.inner = (int(call.attr(name)) for name in ("experts", "hidden", "inner"))
        self.n, self.top_k, self.pairs = n, int(call.attr("top_k")), n * int(call.attr("top_k"))
        self.groups, self.count = int(config["groups"]), int(config.get("rows", 1))

    def emit(self) -> None:
        gate, b = bool(self.call.attr("gated")), self.buffers
        activated = T.alloc_buffer((self.pairs, self.inner), "float32", scope="global")
        parts = T.alloc_buffer((self.pairs, self.hidden), "float32", scope="global")
        sorted_pairs = None if self.call.phase == "decode" else self._sort()

        def activate(pair: Expr, index: Expr, values: Sequence[Expr]) -> None:
            store(activated, gated(self.call, values[0], values[1] if gate else None), pair, index)

        def row_of(pair: Expr) -> Expr:
            return bind(tirx.floordiv(pair, self.top_k))

        if not gate or (self.inner % ROWS == 0 and not self.call.attr("interleave")):
            self._product("gate_up", b["x"], row_of, self.inner, 1 + gate, activate, sorted_pairs)
        else:  # a tile has gates and factors that do not belong together
            raw = T.alloc_buffer((self.pairs, 2 * self.inner), "float32", scope="global")
            self._product("gate_up", b["x"], row_of, 2 * self.inner, 1, _put(raw), sorted_pairs)
            self._gate(raw, activate)
        self._product("down", activated, lambda pair: pair, self.hidden, 1, _put(parts), sorted_pairs)
        self._combine(parts)

    def _sort(self) -> tuple[Expr, Expr]:
        """The pairs in the order of their experts, and for each expert where its pairs begin and end among them.

        A block per expert: each thread counts the pairs of its share that are the expert's, and those of experts before it.
        """
        order = T.alloc_buffer((self.pairs,), "int32", scope="global")
        ends = T.alloc_buffer((self.experts, 2), "int32", scope="global")
        ids, threads = self.buffers["ids"], min(SORTING_THREADS, self.target.max_threads)
        one = tirx.const(1, "int32")
        with launch(self.experts, threads) as (thread, block):
            expert = bind(tirx.Cast("int32", block))
            own, before = shared(threads, "int32"), shared(threads, "int32")
            counts, share = registers(3, "int32"), bind(ceildiv(self.pairs, threads))
            first = bind(i64(thread) * share)
            last = bind(tirx.min(first + share, self.pairs))

            def expert_of(pair: Expr) -> Expr:
                return bind(ids[tirx.floordiv(pair, self.top_k), tirx.floormod(pair, self.top_k)])

            def add(place: int, value: Expr) -> None:
                store(counts, counts[place] + value, place)

            for place in range(3):
                store(counts, tirx.const(0, "int32"), place)
            with T.serial(first, tirx.max(first, last)) as p:
                found = expert_of(i64(p))
                when(found.equal(expert), lambda: add(0, one))
                when(found < expert, lambda: add(1, one))
            store(own, counts[0], thread)
            store(before, counts[1], thread)
            sync()
            store(counts, tirx.const(0, "int32"), 0)
            store(counts, tirx.const(0, "int32"), 1)
            # Now: [0] where this thread's pairs go, [1] where the expert's begin, [2] how many they are.
            with T.serial(0, threads) as other:
                count = bind(own[other])
                when(other < thread, lambda: add(0, count))
                add(1, before[other])
                add(2, count)
            begin = bind(counts[1])
            add(0, begin)
            with T.serial(first, tirx.max(first, last)) as p:

                def put() -> None:
                    store(order, tirx.Cast("int32", p), i64(counts[0]))
                    add(0, one)

                when(expert_of(i64(p)).equal(expert), put)

            def note() -> None:
                store(ends, begin, block, 0)
                store(ends, begin + counts[2], block, 1)

            when(thread.equal(0), note)
        return order, ends

    def _product(
        self,
        stack: str,
        x: Expr,
        row_of: Callable[[Expr], Expr],
        results: int,
        sides: int,
        write: Write,
        sorted_pairs: tuple[Expr, Expr] | None,
    ) -> None:
        """``write(pair, index, values)`` for index < results of every pair: rows ``index`` (and ``index + results``) of the
        expert's matrix times row ``row_of(pair)`` of ``x``, with their bias."""
        o, k = quantized_experts.shape(self.call, stack)
        stacked = {name: self.buffers[f"{stack}.{name}"] for name in quantized_experts.part_names(self.call, stack, LAYOUTS)}
        bias, threads = self.buffers.get(f"{stack}_bias"), self.groups * LANES

        def units_of(expert: Expr) -> Units:
            parts = {name: Of(buffer, expert) for name, buffer in stacked.items()}
            return Units(quantized_experts.how(self.call, stack), o, k, parts)

        def some(
            products: TileProducts, thread: Expr, tile: Expr, units: Units, pair_at: Callable[[Expr], Expr], end: Expr
        ) -> None:
            """The tile for ``count`` pairs ``pair_at(i)``, of which those from ``end`` on repeat others."""
            floats = Floats(self.target, x, k, padded=padded(units, k))
            rows = [row_of(pair_at(tirx.const(r, "int64"))) for r in range(self.count)]
            products.compute(units, [bind(tile + side * (results // ROWS)) for side in range(sides)], floats, rows)

            def finish(item: Expr, _: int) -> None:
                inside, r = bind(tirx.floormod(item, ROWS)), bind(tirx.floordiv(item, ROWS))
                index = bind(tile * ROWS + inside)
                values = []
                for side in range(sides):
                    line = bind(tirx.min(index, results - 1) + side * results)
                    value = bind(products.total(inside, r, side) * units.row_scale(line))
                    values.append(value if bias is None else bind(value + load(bias, expert, line)[0]))
                when(tirx.all(index < results, r < end), lambda: write(pair_at(r), index, values))

            each(thread, threads, ROWS * self.count, finish)

        tiles = -(-results // ROWS)
        if sorted_pairs is None:
            ids = self.buffers["ids"]
            with launch(tiles, threads, self.pairs) as (thread, tile, pair):
                products = TileProducts(self.target, thread, self.groups, 1, sides)
                expert = bind(i64(ids[tirx.floordiv(pair, self.top_k), tirx.floormod(pair, self.top_k)]))
                some(products, thread, tile, units_of(expert), lambda _: pair, tirx.const(1, "int64"))
            return
        order, ends = sorted_pairs
        with launch(tiles, threads, self.experts) as (thread, tile, expert):
            products = TileProducts(self.target, thread, self.groups, self.count, sides)
            begin, end = (bind(i64(read(ends, expert, i))) for i in range(2))
            with T.serial(0, ceildiv(end - begin, self.count)) as step:
                low = bind(begin + i64(step) * self.count)
                pair_at = partial(_nth, order, low, end)
                some(products, thread, tile, units_of(expert), pair_at, bind(end - low))
                sync()  # before sums of the next pairs take the place of these

    def _gate(self, raw: Expr, activate: Write) -> None:
        """The gate of results that are side by side in a workspace."""
        alternate = bool(self.call.attr("interleave"))

        def one(item: Expr) -> None:
            pair, index = bind(tirx.floordiv(item, self.inner)), bind(tirx.floormod(item, self.inner))
            places = (index * 2, index * 2 + 1) if alternate else (index, index + self.inner)
            activate(pair, index, [bind(read(raw, pair, place)) for place in places])

        flat(self.target, self.pairs * self.inner, one)

    def _combine(self, parts: Expr) -> None:
        """out[row] = the sum of its experts' results, each times its weight."""

        def one(item: Expr) -> None:
            row, index = bind(tirx.floordiv(item, self.hidden)), bind(tirx.floormod(item, self.hidden))
            total = registers(1, start=0.0)
            with T.serial(0, tirx.const(self.top_k, "int64")) as j:
                weight = load(self.buffers["weights"], row, j)[0]
                store(total, total[0] + weight * read(parts, row * self.top_k + j, index), 0)
            store_all(self.buffers["out"], [total[0]], row, index)

        flat(self.target, self.n * self.hidden, one)


def _put(workspace: Expr) -> Write:
    """A value to ``workspace[pair, index]``."""
    return lambda pair, index, values: store(workspace, values[0], pair, index)


def _nth(order: Expr, low: Expr, end: Expr, r: Expr) -> Expr:
    """The sorted pair ``low + r``, or the last before ``end``."""
    return bind(i64(read(order, bind(tirx.min(low + r, end - 1)))))


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    return quantized_experts.reference(call, LAYOUTS, *arrays)


roofline = quantized_experts.roofline
