"""``llmc.attend`` of the decode phase on sm_90a: :mod:`.decode_cluster` for few sequences, :mod:`.decode_ring` for many.

The size of the clusters is chosen at launch from the number of sequences: few sequences are cut up to fill the GPU, many are not.
How a sequence is cut therefore depends on its length and on the size of the batch, and the last bits of its row with it. Where
sequences alone fill the GPU, a warp of :mod:`.decode_ring` takes each.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.cuda import decode_cluster, decode_ring, hopper
from llmc.schedules.cuda.decode_softmax import CHUNK
from llmc.schedules.cuda.host_choice import host_choice
from llmc.schedules.cuda.kv_fragments import SCHEMES
from llmc.schedules.gpu import attention_tile
from llmc.schedules.kv_pages import stored_as
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.decode_attention"
OP = "llmc.attend"
HEADS = 16


def _call(hq: int, hk: int, d: int, dv: int = 0, page_size: int = 16, dtype: str = "bfloat16", **attrs: Any) -> KernelCall:
    return attention_tile.make_call(hq, hk, d, dv, page_size, dtype, "decode", **attrs)


SHAPES: dict[str, KernelCall] = {
    "heads_32x8_128": _call(32, 8, 128),
    "group_8_128": _call(8, 1, 128, page_size=32),
    "group_3_64": _call(6, 2, 64, page_size=64),
    "group_1_80_f16": _call(2, 2, 80, dtype="float16"),
    "group_16_96_window": _call(16, 1, 96, window=37),
    "group_12_64_softcap": _call(12, 1, 64, page_size=32, softcap=5.0, dtype="float16"),
    "group_4_256_sinks": _call(4, 1, 256, sinks=1),
    "fp8_group_3_64": _call(6, 2, 64, page_size=64, kv_dtype="fp8_e4m3"),
    "int8_96_48_sinks_window": _call(4, 2, 96, 48, kv_dtype="int8", sinks=1, window=70),
    "chunked_128_64": _call(4, 2, 128, 64, chunk=100, sinks=1),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not hopper.is_hopper(target) or call.phase != "decode" or not attention_tile.takes(call, target):
        return None
    q, pages = call.args[:2]
    (hq, d), hk = (int(v) for v in q.shape[1:]), int(pages.shape[1])
    dv = int(call.attr("v_dim"))
    stored = stored_as(call, pages)
    if stored != q.dtype and (stored not in SCHEMES or q.dtype != "bfloat16"):
        return None
    if q.dtype not in hopper.PTX_TYPE or hq // hk > HEADS or int(call.attr("page_size")) % CHUNK:
        return None
    if d % 16 or dv % 16 or max(d, dv) > 256:
        return None
    return f"{q.dtype} tensor cores, {stored} pages, {hq // hk} heads share their keys, positions split over a cluster"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """``split``: most blocks of a cluster; ``fill``: blocks that keep the GPU busy, beyond which clusters get smaller.

    ``warps`` of a block, more for codes, of which each has half as many bytes on their way; ``least``: chunks of 16 positions that
    are worth a block; ``min_blocks`` per multiprocessor limits registers (0: the compiler's choice); ``many``: pairs of a sequence
    and a KV head from which a warp takes a pair; from a half, and from a quarter of that on two and four warps do (0: never);
    ``dependent_launch``: start early.
    """
    warps = [16, 8, 4] if "kv_scheme" in dict(call.attrs) else [8, 4, 2]
    return {
        "split": [8, 4, 2, 1], "fill": [132, 264, 396], "warps": warps, "least": [4, 8, 16], "min_blocks": [0, 2, 3],
        "many": [1024, 512, 2048, 0], "dependent_launch": [True, False],
    }  # fmt: skip


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """Of ``llmc.rope_attend`` too (:mod:`.rope_attention`)."""
    few = decode_cluster.kernel(call, config)
    many = int(config["many"])
    if not many or not decode_ring.takes(call):
        return few
    lens, pages = (next(p for p in few.params if p.name == name) for name in ("lens", "pages"))
    pairs = lens.ty.shape[0] * pages.ty.shape[1]
    kernels = [few, *(decode_ring.kernel(call, parts, bool(config["dependent_launch"])) for parts in (4, 2, 1))]
    return host_choice(kernels, [pairs < many // 4, pairs < many // 2, pairs < many])


reference = attention_tile.reference
roofline = attention_tile.roofline
