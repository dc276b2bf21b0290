"""``llmc.attend`` in the extend phase on sm_90a: one function that picks a kernel by the tokens of a sequence when it is called.

The kernel is :mod:`.prefill_kernel`. Chunks run with tiles of 128 rows, one thread block to a multiprocessor: each key is read for
the most rows. Many short ones run with tiles of 64, two blocks to a multiprocessor: fewer rows are empty, and while one waits for
its first keys or stores its result, the other computes. The choice is host code and sees the sizes n and b only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.gemm_hopper import MULTIPROCESSORS
from llmc.schedules.cuda.host_choice import host_choice
from llmc.schedules.cuda.prefill_kernel import kernel
from llmc.schedules.cuda.prefill_tiles import Choices, Shape, packed_heads
from llmc.schedules.gpu import attention_tile
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.prefill_attention"
OP = "llmc.attend"
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
MAX_HEAD_DIM = 256
PAGE_SIZES = (8, 16, 32, 64)
"""A page's rows are whole swizzle periods of 8, and a key tile is made of whole pages."""

SHORT = 256
"""The most tokens of a sequence, on average, that are a short chunk; half of them for a single sequence, likely behind a prefix."""

_call = attention_tile.make_call
SHAPES: dict[str, KernelCall] = {
    "gqa_32x8x128": _call(32, 8, 128),
    "gqa_32x8x64_p64": _call(32, 8, 64, page_size=64),
    "small_2x1x128": _call(2, 1, 128),
    "small_3x3x64_f16": _call(3, 3, 64, page_size=32, dtype="float16"),
    "window_2x1x128": _call(2, 1, 128, window=100),
    "softcap_2x2x64": _call(2, 2, 64, softcap=5.0, page_size=64),
    "softcap_window_1x1x256": _call(1, 1, 256, softcap=30.0, window=33),
    "sinks_4x2x64": _call(4, 2, 64, sinks=1, page_size=8, window=70),
    "chunked_2x1x128_f16": _call(2, 1, 128, chunk=48, dtype="float16"),
    "small_1x1x192": _call(1, 1, 192, page_size=64),
    "group_3_80": _call(6, 2, 80, page_size=32),
    "group_8_96_f16": _call(8, 1, 96, dtype="float16"),
    "group_7_48_window": _call(7, 1, 48, window=40, sinks=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not hopper.is_hopper(target) or call.phase != "extend":
        return None
    q, pages = call.args[:2]
    (hq, d), hk, page_size = (int(v) for v in q.shape[1:]), int(pages.shape[1]), int(call.attr("page_size"))
    if hq % hk or d % 16 or d > MAX_HEAD_DIM or d != call.attr("v_dim"):
        return None
    if q.dtype not in hopper.PTX_TYPE or {pages.dtype, call.result.dtype} != {q.dtype}:
        return None
    if page_size not in PAGE_SIZES or call.attr("scale") <= 0 or any(s.dtype not in WIDTH for s in call.args[5:]):
        return None
    heads = packed_heads(hq // hk, 128)
    return f"{q.dtype} tensor cores (wgmma), online softmax, {heads} heads share their keys, {page_size}-position pages by TMA"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``short``, ``long``: rows of a tile, positions of a tile of keys, and blocks that share keys, for such chunks; ``lazy``: of
    which chunks sums are rescaled only when they must be; the rest is what :class:`~.prefill_tiles.Choices` has.
    """
    d, page_size = int(call.args[0].shape[2]), int(call.attr("page_size"))
    if d <= 64:
        short = long = [[64, 128, 1], [128, 128, 2], [128, 128, 1], [64, 64, 1]]
    elif d <= 128:
        short, long = [[64, 64, 1], [128, 128, 2]], [[128, 128, 2], [128, 128, 1], [64, 64, 1]]
    else:
        short = long = [[128, 64, 2], [128, 64, 1], [64, 64, 1]]
    # Neither gains over all sizes with other heads, as measured on an H200.
    middle = 64 < d <= 128
    shapes = {"short": short, "long": long}
    return {
        **{length: [s for s in shapes[length] if s[1] % (s[2] * page_size) == 0] for length in shapes},
        "stages": [2],
        "blocks": [MULTIPROCESSORS],
        "lazy": ["short", "never", "always"] if middle else ["never", "always"],
        "turns": [True, False] if middle else [False, True],
        "dependent_launch": [True, False],
    }


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    def chosen(length: str) -> tuple[Shape, Choices]:
        lazy, (rows, keys, share) = config["lazy"] in (length, "always"), (int(v) for v in config[length])
        turns, early = bool(config["turns"]), bool(config["dependent_launch"])
        return Shape(rows, keys, share), Choices(int(config["stages"]), int(config["blocks"]), lazy, turns, early)

    kernels = [kernel(call, *which) for which in dict.fromkeys(chosen(length) for length in ("short", "long"))]
    if len(kernels) == 1:
        return kernels[0]
    q, _, table = kernels[0].params[:3]
    n, b = q.ty.shape[0], table.ty.shape[0]
    return host_choice(kernels, [n <= tirx.Select(b > 1, b * SHORT, tirx.const(SHORT // 2, "int64"))])


reference = attention_tile.reference


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """``context``: positions of each of the b sequences. Every one is read once; every row is multiplied by all it may see.

    The n rows are the last n / b of each sequence, so row i of r sees context - r + i + 1 positions, at most a window.
    """
    n, hq, d = call.args[0].bind(symbols)
    batch, context, window = symbols["b"], symbols["context"], int(call.attr("window"))
    rows = n // batch
    seen = np.arange(context - rows + 1, context + 1)
    pairs = batch * int((np.minimum(seen, window) if window > 0 else seen).sum())
    cache = batch * context * int(call.args[1].shape[1]) * 2 * d
    return WIDTH[call.args[0].dtype] * (cache + 2 * n * hq * d), 4 * pairs * hq * d
