"""``llmc.linear`` over many rows by AMX, weights bfloat16 in place as stored: x in three bfloat16 parts, sums in float32.

A float32 is the sum of three bfloat16 numbers (8 of its 24 bits each), so the products of the parts with a weight are exact, as
those of x are in a wider accumulator: three times the instructions, and nothing is rounded that a float32 kernel does not round.
Below 2^-102 the smallest part may be lost, as the instruction takes subnormal numbers for 0.

Rows of weights are tiles as they lie, 16 outputs by 32 columns; x is repacked once, 16 rows by 32 columns a tile with pairs of
columns side by side, so what comes out is [outputs, rows] and is turned around in registers at the end. Two tiles of weights meet
two of x: a tile instruction waits for the one before with the same sums, and a register is free for other contents only when the
instruction before has read it.

A row's result does not depend on the other rows. It is not the bits that the decode phase's kernel (:mod:`.linear`) gives, where
sums go along k in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu import linear, tiles
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, ceildiv, function, i64, keep, read, shuffle, store, vector
from llmc.schedules.cpu.linear import _call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

Expr = Any
NAME = "cpu.linear_tiles"
OP = linear.OP
STEP = 32
"""Columns of a tile."""
PAIRS = STEP // 2
PARTS = 3
OUTPUTS = 2 * tiles.ROWS
"""Outputs of a task."""
GROUP = 2 * tiles.ROWS
"""Rows of x that meet them at a time."""
TILE = PAIRS * tiles.ROWS
"""Words of a tile of x."""
X_CACHE = 1 << 20
"""Bytes of repacked rows that one group of weight tiles after the other passes over: part of a second-level cache."""
FEW_ROWS = "r"
"""The dimension of rows with logits (:mod:`llmc.passes.phases`): one for each sequence, too few for tiles."""
C, A, B = 0, 4, 6
"""Registers: sums of weight tile w and x tile r, number 2 w + r; weights; one part of x."""

SHAPES: dict[str, KernelCall] = {
    "square_576": _call(576, 576, "bfloat16"),
    "odd_45x96_bias_residual": _call(45, 96, "bfloat16", bias=1, residual=1),
    "one_step_32x32_silu": _call(32, 32, "bfloat16", activation="silu"),
    "power_of_two_33x2048_gelu": _call(33, 2048, "bfloat16", activation="gelu", bias=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if not tiles.has(target, tiles.BF16) or call.phase == "decode" or linear.matches(call, target) is None:
        return None
    o, k = call.args[1].shape
    if call.args[0].shape[0] == FEW_ROWS:
        return None
    if call.args[1].dtype != "bfloat16" or call.result.dtype != "float32" or int(k) % STEP or int(o) < OUTPUTS:
        return None
    return f"bfloat16 weights in place, AMX tiles, x in {PARTS} bfloat16 parts"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``row_block``: rows that pass over a group of weight tiles before the next group comes."""
    fits = min(max(X_CACHE // (2 * PARTS * int(call.args[1].shape[1])) // GROUP * GROUP, GROUP), 512)
    return {"row_block": [fits, *(b for b in (32, 64, 128, 256, 512) if b != fits)]}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    simd, symbols = Simd(target), Symbols()
    o, k = (int(d) for d in call.args[1].shape)
    block, steps, tasks = int(config["row_block"]), k // STEP, -(-o // OUTPUTS)
    specs = dict(zip(linear._names(call), (*call.args, call.result), strict=True))
    with function(f"linear_tiles_{o}x{k}") as done:
        buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
        n = symbols.dim(call.args[0].shape[0])
        groups = bind(ceildiv(n, GROUP))
        packed = T.alloc_buffer((ceildiv(n, GROUP) * (steps * PARTS * 2 * TILE),), "uint32")
        with T.parallel(0, groups) as g, T.serial(0, steps) as s:
            _pack(simd, buffers["x"], n, packed, i64(g), i64(s), steps)

        def task(t: Expr) -> None:
            low = keep(tirx.floordiv(t, tasks) * (block // GROUP))
            high = bind(tirx.min(low + block // GROUP, groups))
            # The last outputs are a whole task, too: some of them are those of the task before, with the same bits.
            first = bind(tirx.min(tirx.floormod(t, tasks) * OUTPUTS, i64(o - OUTPUTS)))
            shapes = [(tiles.ROWS, 4 * tiles.ROWS)] * 4 + [(tiles.ROWS, 2 * STEP)] * 2 + [(PAIRS, 4 * tiles.ROWS)] * 2
            memory = [(OUTPUTS * GROUP, "float32")] * 2
            with tiles.configured(shapes, *memory) as (sums, turned), T.serial(low, high) as g:
                group = bind(i64(g))
                _products(buffers["weight"], packed, sums, first, group, steps, k)
                _turn(simd, sums, turned)
                _finish(call, simd, buffers, turned, first, group * GROUP, n)

        with T.parallel(0, ceildiv(n, block) * tasks) as t:
            task(i64(t))
    return done()


def _products(weight: Expr, packed: Expr, sums: Expr, first: Expr, group: Expr, steps: int, k: int) -> None:
    """The sums of 32 rows of x with 32 outputs from ``first`` on, to ``sums`` [output, row]."""
    for register in range(4):
        tiles.zero(C + register)
    with T.serial(0, steps) as s:
        x = bind((group * steps + i64(s)) * (PARTS * 2 * TILE))
        for w in range(2):
            tiles.load(A + w, weight, first + w * tiles.ROWS, i64(s) * STEP, stride=2 * k)
        for part in range(PARTS):
            for r in range(2):
                tiles.load(B + r, packed, x + (2 * part + r) * TILE, stride=4 * tiles.ROWS)
            for r in range(2):
                for w in range(2):
                    tiles.multiply("tdpbf16ps", C + 2 * w + r, A + w, B + r)
    for w in range(2):
        for r in range(2):
            start = i64(w * tiles.ROWS * GROUP + r * tiles.ROWS)
            tiles.store(C + 2 * w + r, sums, start, stride=4 * GROUP)


def _pack(simd: Simd, x: Expr, n: Expr, packed: Expr, group: Expr, step: Expr, steps: int) -> None:
    """Columns 32 · step and on of 32 rows as tiles of x, two for each part. Rows behind the last are copies of it."""
    lanes = min(simd.lanes, PAIRS)
    with T.serial(0, GROUP // lanes) as r, T.serial(0, PAIRS // lanes) as p:
        row, pair = bind(i64(r) * lanes), bind(i64(p) * lanes)
        tile = bind(((group * steps + step) * (2 * PARTS) + tirx.floordiv(row, tiles.ROWS)) * TILE)
        rows = [bind(tirx.min(group * GROUP + row + i, n - 1)) for i in range(lanes)]
        words = [_parts(simd, x, r, step * STEP + pair * 2, lanes) for r in rows]
        for part in range(PARTS):
            for i, column in enumerate(_transposed([of_row[part] for of_row in words], lanes)):
                at = tile + (part * 2 * TILE + i * tiles.ROWS) + pair * tiles.ROWS + tirx.floormod(row, tiles.ROWS)
                store(packed, column, at, lanes=lanes)


def _parts(simd: Simd, x: Expr, row: Expr, start: Expr, lanes: int) -> list[Expr]:
    """The parts of 2 · ``lanes`` columns of a row, pairs of them in a word: upper bits of x, of what is left, and of the rest."""
    words, floats = vector("uint32", lanes), vector("float32", lanes)
    upper, half = (tirx.Broadcast(tirx.const(v, "uint32"), lanes) for v in (0xFFFF0000, 16))
    both = [bind(read(x, row, start + i * lanes, lanes=lanes)) for i in range(2)]
    left, found = [bind(shuffle(both, range(odd, 2 * lanes, 2))) for odd in range(2)], []
    for _ in range(PARTS):
        bits = [bind(tirx.reinterpret(words, value) & upper) for value in left]
        found.append(bind((bits[0] >> half) | bits[1]))
        left = [bind(value - tirx.reinterpret(floats, b)) for value, b in zip(left, bits, strict=True)]
    return found


def _transposed(vectors: list[Expr], lanes: int) -> list[Expr]:
    """The columns of ``lanes`` vectors: lane j of vector i becomes lane i of vector j."""
    distance = 1
    while distance < lanes:
        turned = list(vectors)
        for i in range(lanes):
            if i & distance:
                continue
            pair = [vectors[i], vectors[i + distance]]
            low = [lane if not lane & distance else lanes + lane - distance for lane in range(lanes)]
            turned[i] = bind(shuffle(pair, low))
            turned[i + distance] = bind(shuffle(pair, [lane + distance for lane in low]))
        vectors, distance = turned, 2 * distance
    return vectors


def _turn(simd: Simd, sums: Expr, turned: Expr) -> None:
    """[output, row] to [row, output]."""
    lanes = min(simd.lanes, tiles.ROWS)
    with T.serial(0, OUTPUTS // lanes) as o, T.serial(0, GROUP // lanes) as r:
        output, row = bind(i64(o) * lanes), bind(i64(r) * lanes)
        columns = [bind(read(sums, (output + i) * GROUP + row, lanes=lanes)) for i in range(lanes)]
        for i, value in enumerate(_transposed(columns, lanes)):
            store(turned, value, (row + i) * OUTPUTS + output, lanes=lanes)


def _finish(call: KernelCall, simd: Simd, buffers: dict[str, Expr], sums: Expr, first: Expr, start: Expr, n: Expr) -> None:
    """The rows from ``start`` on of ``sums`` [row, output], outputs ``first`` and on."""
    lanes = min(simd.lanes, tiles.ROWS)
    with T.serial(start, tirx.min(start + GROUP, n)) as r:
        row = bind(i64(r))
        for output in range(0, OUTPUTS, lanes):
            value = bind(read(sums, (row - start) * OUTPUTS + output, lanes=lanes))
            linear._finish(call, simd, buffers, value, row, first + output, lanes)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    return linear.reference(call, *arrays)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    return linear.roofline(call, **symbols)
