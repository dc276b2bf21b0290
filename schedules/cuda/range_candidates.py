"""What is tried for a range of rows: configurations of the kernels that take few, tens or many rows of a linear on sm_90a.

Points that cannot be built, or differ from a neighbour in nothing that the hardware sees, are left out: a limit on registers that
no block comes near, more warps than there are pieces of k.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmc.schedules.cuda import (
    gemm_hopper,
    gemm_split,
    gemv,
    linear_call,
    quantized_gemv,
    quantized_ring,
    quantized_tiles,
    ring_gemv,
)
from llmc.schedules.gpu import layout_mma, quantized_call
from llmc.schedules.protocol import KernelCall

Config = dict[str, Any]
LIMITS = {16: (0, 2), 8: (0, 2, 3), 4: (0, 3), 2: (0,)}
"""Warps of a block that streams weights through registers -> blocks of a multiprocessor that its registers are limited to."""

IN_FLIGHT = 8
"""Most tiles times depth of :mod:`.gemv`: a lane holds 8 registers of weights for each."""

X_REGISTERS = 64
"""Most registers of a lane for its rows of x."""

SUMS = 768
"""Most warps times tiles (and one more for a norm) times rows of x: their sums fill the 48 KB of shared memory."""

CODE_REGISTERS = 64
"""Most registers of a lane of :mod:`.quantized_gemv` for codes in flight."""

RINGS = (ring_gemv.RING_BYTES, 160 << 10)
QUANTIZED_RINGS = (ring_gemv.RING_BYTES, 96 << 10)
SPLIT_TILES = (
    (128, 16, 2), (128, 16, 1), (64, 16, 2), (128, 32, 2), (128, 32, 1), (64, 32, 2), (256, 32, 1), (128, 64, 2), (128, 64, 1),
    (64, 64, 2), (256, 64, 1), (128, 128, 1), (128, 128, 2), (64, 128, 2), (256, 128, 1), (128, 256, 1),
)  # fmt: skip
LONG, NARROW_ROWS = 8192, 32
QUANTIZED_TILES = (*quantized_tiles.TILES, (64, 16, 2), (128, 32, 2), (128, 32, 1), (128, 64, 2), (64, 128, 2))


def gemvs(call: KernelCall, columns: int) -> list[Config]:
    """:mod:`.gemv` for up to ``columns`` rows, its default first."""
    k = int(call.args[1].shape[1])
    warps, depth = gemv.default_split(call, columns)
    first = (warps, min(depth, 2 * X_REGISTERS // columns), 1, 0)
    points = [
        (warps, depth, tiles, blocks)
        for warps, limits in LIMITS.items()
        for depth in (1, 2, 4, 8)
        for tiles in (1, 2)
        for blocks in limits
        if depth * tiles <= IN_FLIGHT and depth * columns // 2 <= X_REGISTERS and gemv.CHUNK * depth * (warps // 2) < k
    ]
    found = [point for point in dict.fromkeys([first, *points]) if point[0] * (point[2] + 1) * columns <= SUMS]
    return [
        {"kernel": "gemv", "warps": warps, "depth": depth, "tiles": tiles, "columns": columns, "min_blocks": blocks}
        for warps, depth, tiles, blocks in found
    ]


def rings(call: KernelCall, columns: int) -> list[Config]:
    """:mod:`.ring_gemv`, its default first; none if it does not take the call."""
    return [
        {"kernel": "ring_gemv", "split": list(split), "columns": columns, "ring": ring}
        for ring in RINGS
        for split in ring_gemv.splits(call, columns)
    ]


def splits(call: KernelCall, rows: int, heights: Iterable[int]) -> list[Config]:
    """:mod:`.gemm_split` with tiles as high as one of ``heights``; the best known for ``rows`` rows first if it is one of these."""
    allowed = set(heights)
    points = [
        (tile, split, share)
        for tile in SPLIT_TILES
        for split in gemm_split.splits(call)
        for share in (1, 2, 4)
        if gemm_split.fits(call, tile, split, share)
    ]
    first = _narrow(call, rows) or gemm_split.default(call, rows)
    return [
        {"kernel": "gemm_split", "tile": list(tile), "split": split, "share": share}
        for tile, split, share in dict.fromkeys([first, *points])
        if tile[1] in allowed
    ]


def _narrow(call: KernelCall, rows: int) -> gemm_split.Choice | None:
    """Few rows: tiles of 64 outputs, where they make nearly as many blocks as there are multiprocessors. In a layer of an 8B model
    they were 1 us of 127 faster in down, 0.2 in o and 0.5 in qkv.
    """
    o, k = (int(d) for d in call.args[1].shape)
    if rows > NARROW_ROWS or linear_call.activation(call)[1]:
        return None
    tiles, busy = -(-o // 64), gemm_split.MULTIPROCESSORS
    fitting = [s for s in gemm_split.splits(call) if busy * 7 // 10 < s * tiles <= busy and (s <= 2 or k >= LONG)]
    return ((64, 32, 1), fitting[-1], 1) if fitting else None


def persistent(call: KernelCall, rows: int | None) -> list[Config]:
    """:mod:`.gemm_hopper` for about ``rows`` rows (None: many), its default first; for hundreds also with low tiles."""
    low = [((64, columns), cluster) for columns in (256, 128) for cluster in (1, 2)] if rows is not None and rows <= 512 else []
    return [
        {"kernel": "gemm_hopper", "tile": list(tile), "cluster": cluster, "blocks": gemm_hopper.MULTIPROCESSORS}
        for tile, cluster in [*gemm_hopper.candidates(call, rows), *low]
    ]


def quantized_gemvs(call: KernelCall, columns: int) -> list[Config]:
    """:mod:`.quantized_gemv` for up to ``columns`` rows, its default first."""
    at = layout_mma.geometry(quantized_call.how(call), int(call.attr("o")), int(call.attr("k")))
    points = [
        (warps, tiles, depth, blocks)
        for warps, limits in LIMITS.items()
        for tiles in (1, 2, 4)
        for depth in (1, 2, 4)
        for blocks in limits
        if tiles * depth * 2 * at.bits <= CODE_REGISTERS and depth * (warps // 2) < at.blocks
    ]
    first = (*quantized_gemv.default(call, columns), 0)
    found = [point for point in dict.fromkeys([first, *points]) if point[0] * (point[1] + 1) * columns <= SUMS]
    return [
        {"kernel": "gemv", "warps": warps, "tiles": tiles, "depth": depth, "columns": columns, "min_blocks": blocks}
        for warps, tiles, depth, blocks in found
    ]


def quantized_rings(call: KernelCall, columns: int) -> list[Config]:
    """:mod:`.quantized_ring`, its default first; none if it does not take the call."""
    if quantized_ring.most_rows(call) < columns:
        return []
    return [
        {"kernel": "ring", "split": list(split), "columns": room, "ring": ring}
        for room in (_rooms(call) if columns == 1 else [columns])
        for ring in QUANTIZED_RINGS
        for split in quantized_ring.splits(call, room)
    ]


def _rooms(call: KernelCall) -> list[int]:
    """Rows of x that :mod:`.quantized_ring` has room for where there is one, the best first: no more, but where its ring would
    hold all of a block's codes. It is slower then (down of a 1B model in int8 7.0 us and, with half of the ring, 6.1)."""
    at = layout_mma.geometry(quantized_call.how(call), int(call.attr("o")), int(call.attr("k")))
    of_block = -(-at.tiles // quantized_ring.MULTIPROCESSORS) * quantized_ring.ROWS * at.columns * at.bits // 8
    most = quantized_ring.most_rows(call)
    return list(dict.fromkeys([most, 1] if of_block <= ring_gemv.RING_BYTES else [1, most]))


def quantized_gemms(call: KernelCall, rows: int) -> list[Config]:
    """:mod:`.quantized_gemm` for up to ``rows`` rows, its default first."""
    gated = linear_call.activation(call)[1]
    widest = min(128 if gated else 256, max(2 * rows, 32))
    least = min(widest, rows) // 4
    # Codes of 8 bits take registers that products of a few rows have a use for.
    depths = (2, 4) if gated or (_bits(call) == 8 and rows <= 64) else (4, 2)
    first = (*quantized_tiles.default(call, rows), depths[0])
    points = [
        (tile, split, depth)
        for depth in depths
        for tile in QUANTIZED_TILES
        for split in quantized_tiles.SPLITS
        if least <= tile[1] <= widest and quantized_tiles.fits(call, tile, split)
    ]
    return [
        {"kernel": "gemm", "tile": list(tile), "split": split, "depth": depth}
        for tile, split, depth in dict.fromkeys([first, *points])
    ]


def quantized_tens(call: KernelCall, rows: int) -> list[Config]:
    """Both kernels for up to ``rows`` rows, tens of them, the default first."""
    gemms, gemvs = quantized_gemms(call, rows), quantized_gemvs(call, rows)
    tiles, busy = -(-int(call.attr("o")) // 32), gemm_split.MULTIPROCESSORS
    if int(call.attr("k")) < LONG or linear_call.activation(call)[1] or not busy * 3 // 4 < tiles <= busy:
        return gemms + gemvs
    # A long k for nearly all multiprocessors: 32 outputs to each, in one pass, were a quarter faster than clusters in two.
    depth = 2 if _bits(call) == 8 else 1
    first = {"kernel": "gemv", "warps": 8, "tiles": 2, "depth": depth, "columns": rows, "min_blocks": 0}
    return [first, *(g for g in gemvs if g != first), *gemms]


def _bits(call: KernelCall) -> int:
    return layout_mma.geometry(quantized_call.how(call), int(call.attr("o")), int(call.attr("k"))).bits
