"""Tiles of :mod:`.quantized_gemm`: ``(outputs, rows of x, blocks that a multiprocessor holds at a time)``, and how many share k."""

from __future__ import annotations

from llmc.schedules.cuda import cluster_finish, linear_call
from llmc.schedules.cuda.gemm_hopper import MULTIPROCESSORS
from llmc.schedules.protocol import KernelCall

Tile = tuple[int, int, int]
K_STEP = 64
"""Columns of the weight in a stage of the pipeline."""

TILES = [(128, 256, 1), (128, 128, 1), (64, 256, 1), (64, 128, 1), (128, 64, 1), (64, 64, 2), (64, 32, 3), (64, 32, 2), (64, 16, 3)]
SPLITS = (1, 2, 4, 8)
CLUSTERED = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS, 4: 120, 8: 112}
"""Blocks of clusters of that many that run at a time, one to a multiprocessor: a cluster stays in one of the GPU's parts."""

WIDER = 1.5
"""The time of a tile of 256 columns in tiles of 128."""

SHARED = 224 << 10
"""Bytes of shared memory of a multiprocessor for its blocks."""


def default(call: KernelCall, rows: int) -> tuple[Tile, int]:
    """``tile`` and ``split`` for up to ``rows`` rows, as measured on an H200 in the layers of models of 1 to 70 billion parameters.

    Codes are made into operands once for every tile of x, so that a tile is as wide as x and as high as it can be, unless half of
    the multiprocessors, or the last of few rounds, would have nothing to do. Then k is split for as many blocks as fit at a time.
    """
    gated = linear_call.activation(call)[1]
    columns = next((c for c in (16, 32, 64) if rows <= c), 128)

    def tiles(height: int, columns: int) -> int:
        return -(-int(call.attr("o")) // ((1 + gated) * height)) * -(-rows // columns)

    height = 128 if columns == 128 or (gated and columns == 64 and tiles(64, columns) > MULTIPROCESSORS) else 64
    if columns == 128:
        if gated:
            columns = 64 if 2 * tiles(height, columns) <= MULTIPROCESSORS else 128
        elif rows > 512 or _rounds(tiles(height, 256)) * WIDER < _rounds(tiles(height, 128)):
            columns = 256
    resident = ({16: 2, 32: 2} if gated else {16: 3, 32: 3, 64: 2}).get(columns, 1)
    count = tiles(height, columns)
    fitting = [s for s in SPLITS if s * count <= resident * (CLUSTERED[s] if resident == 1 else MULTIPROCESSORS)]
    return (height, columns, resident), max((s for s in fitting if s * 2 <= -(-int(call.attr("k")) // (4 * K_STEP))), default=1)


def _rounds(tiles: int) -> int:
    return -(-tiles // MULTIPROCESSORS)


def fits(call: KernelCall, tile: Tile, split: int) -> bool:
    """Whether a tile's sums fit in shared memory, its registers in a block's, and every part of k has steps of its own."""
    rows, columns, resident = tile
    sides = 1 + linear_call.activation(call)[1]
    if sides * columns > 256 or split * 2 > -(-int(call.attr("k")) // K_STEP):
        return False
    return 4 * sides * columns * cluster_finish.pitch(rows) <= SHARED // resident
