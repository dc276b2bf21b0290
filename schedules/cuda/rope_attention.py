"""``llmc.rope_attend`` on sm_90a: the decode attention kernels with rotation and append inside (:mod:`.decode_rotation`).

Configurations are those of :mod:`.decode_attention`, and so are the records that say which is best.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llmc.dialect import rope_attend
from llmc.schedules.cuda import decode_attention, decode_rotation
from llmc.schedules.cuda.decode_rotation import attend_call
from llmc.schedules.gpu.rope_append import make_call as rope_append_call
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.rope_attention"
OP = rope_attend.OP


def _call(
    hq: int, hk: int, d: int, dv: int = 0, page_size: int = 16, dtype: str = "bfloat16", rotary: int = 0, table: str = "float32",
    interleaved: int = 0, norm: int = 0, offset: float = 0.0, **attrs: Any,
) -> KernelCall:  # fmt: skip
    attend = decode_attention._call(hq, hk, d, dv, page_size, dtype, **attrs)
    append = rope_append_call(
        hq, hk, d, dv, rotary, page_size, dtype, table=table, interleaved=interleaved, norm=norm, offset=offset
    )
    rows = [replace(spec, shape=tuple("b" if n == "n" else n for n in spec.shape)) for spec in append.args]
    state = rope_attend.STATE + 2
    args = (*rows[: rope_attend.INPUTS], *attend.args[2:state], *rows[rope_attend.INPUTS :], *attend.args[state:])
    merged = tuple(sorted({**dict(attend.attrs), **dict(append.attrs)}.items()))
    return KernelCall(OP, args, attend.result, merged, "decode")


SHAPES: dict[str, KernelCall] = {
    "heads_32x8_128": _call(32, 8, 128),
    "norm_group_8_128": _call(8, 1, 128, page_size=32, norm=1),
    "group_3_64": _call(6, 2, 64, page_size=64, table="bfloat16"),
    "group_1_80_f16_pairs": _call(2, 2, 80, dtype="float16", interleaved=1),
    "partial_64_of_96_window": _call(16, 1, 96, rotary=64, window=37),
    "group_12_64_softcap": _call(12, 1, 64, page_size=32, softcap=5.0, dtype="float16"),
    "norm_offset_4_256_sinks": _call(4, 1, 256, sinks=1, norm=1, offset=1.0),
    "pairs_partial_20_of_96_48_norm": _call(4, 2, 96, 48, rotary=20, interleaved=1, norm=1, window=70),
    "chunked_128_64": _call(4, 2, 128, 64, chunk=100, sinks=1),
    "group_16_128": _call(16, 1, 128, rotary=100),
}


def measured_as(call: KernelCall) -> tuple[Any, KernelCall]:
    """Records are those of the attention alone."""
    return decode_attention, attend_call(call)


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not decode_rotation.takes(call):
        return None
    why = decode_attention.matches(attend_call(call), target)
    return None if why is None else f"rotation and append inside; {why}"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """That of the attention alone."""
    return decode_attention.space(attend_call(call), target)


build = decode_attention.build


def reference(call: KernelCall, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rope_attend.reference(*arrays, **dict(call.attrs))


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """That of the attention alone: what it adds is a row of the projection for each sequence."""
    return decode_attention.roofline(attend_call(call), **symbols)
