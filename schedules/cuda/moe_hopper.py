"""``llmc.moe`` on sm_90a: grouped wgmma over the pairs of a row and an expert, sorted by expert.

Five kernels, no host synchronisation, so a step stays one CUDA graph: the pairs are sorted and cut into tiles of one expert
(:mod:`.moe_route`), rows of x are copied to their places, the two projections are grouped :mod:`.gemm_split` kernels (a tile reads
its expert's matrix once for all of its rows, gate and up become the hidden value in the epilogue), and a row's results are summed
in the order of its ``ids``. Experts' results are rounded to x's dtype before the sum. How high tiles are follows the number of rows
at launch: about as many as an expert gets.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from llmc.schedules.cuda import gemm_split, hopper, linear_call, moe_route
from llmc.schedules.cuda.host_choice import host_choice, in_sequence
from llmc.schedules.gpu import moe as portable
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.moe_hopper"
OP = "llmc.moe"
SHAPES: dict[str, KernelCall] = {
    "experts_8_4096x14336": portable._call(4096, 14336, 8, 2),
    "experts_128_2048x768": portable._call(2048, 768, 128, 8),
    "small_136x72": portable._call(136, 72, 5, 2),
    "plain_64x200_f16": portable._call(64, 200, 3, 1, "float16", gated=0, activation="relu2"),
    "all_72x64_gelu": portable._call(72, 64, 4, 4, activation="gelu_tanh"),
}
FULL = 0.5
"""Tiles are as high as to be this full, on average, if rows spread evenly over the experts."""


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not hopper.is_hopper(target) or call.attr("activation") not in hopper.ACTIVATIONS:
        return None
    x, ids, _, gate_up, down = call.args[:5]
    if any(call.attr(name) for name in ("interleave", "bias", "limit", "offset")) or call.attr("alpha") != 1:
        return None
    if x.dtype not in hopper.PTX_TYPE or {gate_up.dtype, down.dtype, call.result.dtype} != {x.dtype} or ids.dtype != "int32":
        return None
    experts, h, inner = (int(d) for d in down.shape)
    if h % moe_route.LANES or inner % moe_route.LANES or experts > moe_route.MOST_EXPERTS:
        return None
    return f"{x.dtype} tensor cores (wgmma) over rows sorted by expert, float32 sums"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``tiles``: outputs, rows, blocks of a multiprocessor of the tiles to choose from; ``dependent_launch``: start early.

    Tiles of 64 outputs give narrow experts twice as many blocks where there are few rows.
    """
    few, narrow, some, many = [128, 16, 2], [64, 16, 2], [128, 64, 2], [128, 128, 1]
    return {
        "tiles": [
            [few, some, many], [[128, 32, 2], [128, 256, 1]], [narrow, some, many], [few, [128, 32, 2], some, many],
            [narrow, [64, 32, 2], some, many], [few, some, [128, 256, 1]],
        ],
        "dependent_launch": [True, False],
    }  # fmt: skip


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    early, top_k = bool(config["dependent_launch"]), int(call.attr("top_k"))
    experts, h, inner = (int(d) for d in call.args[4].shape)
    dtype, wide = call.args[0].dtype, int(call.args[3].shape[1])
    activation = str(call.attr("activation")) + "_gated" * bool(call.attr("gated"))
    tiles = [(int(o), int(r), int(resident)) for o, r, resident in config["tiles"]]

    def chain(tile: tuple[int, int, int]) -> Any:
        # Operands by position; a name of a workspace is a buffer of the function's own.
        how = {"tile": tile, "split": 1, "share": 1, "dependent_launch": early}
        gate_up = gemm_split.kernel(linear_call.sample(wide, h, dtype, activation=activation), how, experts)
        down = gemm_split.kernel(linear_call.sample(h, inner, dtype), how, experts)
        n = tirx.Var("n", "int64")
        pairs = n * top_k
        workspaces = {
            "position": ((pairs,), "int32"),
            "tiles": ((moe_route.tile_bound(pairs, experts, tile[1]), 3), "int32"),
            "rows": ((pairs, h), dtype),
            "hidden": ((pairs, inner), dtype),
            "parts": ((pairs, h), dtype),
        }
        operands = {
            "x": ((n, h), dtype), "ids": ((n, top_k), "int32"), "weights": ((n, top_k), call.args[2].dtype),
            "gate_up": ((experts, wide, h), dtype), "down": ((experts, h, inner), dtype), "out": ((n, h), dtype),
        }  # fmt: skip
        steps = [
            (moe_route.sort(experts, top_k, tile[1], early), ("ids", "position", "tiles")),
            (moe_route.scatter(h, top_k, dtype, early), ("x", "position", "rows")),
            (gate_up, ("rows", "gate_up", "tiles", "hidden")),
            (down, ("hidden", "down", "tiles", "parts")),
            (moe_route.gather(h, top_k, dtype, call.args[2].dtype, early), ("weights", "position", "parts", "out")),
        ]
        return in_sequence(f"moe_{experts}x{h}", operands, workspaces, steps)

    kernels = [chain(tile) for tile in tiles]
    n = kernels[0].params[0].ty.shape[0]
    return host_choice(kernels, [n * top_k <= int(tile[1] * FULL * experts) for tile in tiles[:-1]])


reference, roofline = portable.reference, portable.roofline
