"""``llmc.rms_norm`` of rows in 16-bit types on sm_90a: a thread block to a row, 16 bytes of it to a thread.

The portable family (:mod:`llmc.schedules.gpu.norm`) keeps a row in float32 registers; this takes a tenth to a quarter less time on
an H200. Statistics are float32. The order of a row's additions depends on its length alone.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper
from llmc.schedules.cuda.row_norm import LANES, value
from llmc.schedules.gpu import norm
from llmc.schedules.gpu.emit import WIDTH
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.rms_norm"
OP = "llmc.rms_norm"
MOST = 8192
"""Values of a row that the threads of a block hold."""

Expr = Any

SHAPES: dict[str, KernelCall] = {
    "hidden_4096": norm._rms(("n", 4096)),
    "hidden_1000_offset": norm._rms(("n", 1000), 1.0, "float16", "float32"),
    "hidden_56": norm._rms(("n", 56), 0.0, "bfloat16", "float16"),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or not hopper.is_hopper(target) or len(call.args[0].shape) != 2:
        return None
    (x, weight), k = call.args, call.args[0].shape[1]
    if x.dtype not in hopper.PTX_TYPE or call.result.dtype != x.dtype or weight.dtype not in WIDTH:
        return None
    if not isinstance(k, int) or k % LANES or k > MOST:
        return None
    return "a row in the registers of a thread block, float32 statistics"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """Nothing to choose: ``dependent_launch``, start early, always pays."""
    return {"dependent_launch": [True]}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    x_spec, weight_spec = call.args
    k, dtype, weight_dtype = int(x_spec.shape[1]), x_spec.dtype, weight_spec.dtype
    eps, offset = float(call.attr("eps")), float(call.attr("offset"))
    dependent_launch = bool(config["dependent_launch"])
    vectors = k // LANES
    warps = -(-vectors // 32)
    to_pair = hopper.packed_convert(dtype)
    words = WIDTH[weight_dtype] * LANES // 4  # of a thread's weights

    def gained(held: Expr, gains: Expr, scale: Expr, i: int) -> Expr:
        gain = T.reinterpret("float32", gains[i]) if WIDTH[weight_dtype] == 4 else value(gains, i, weight_dtype)
        return value(held, i, dtype) * scale * (gain + T.float32(offset))

    @T.prim_func
    def normed(x_ptr: T.handle, weight_ptr: T.handle, out_ptr: T.handle) -> None:
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        weight = T.match_buffer(weight_ptr, (k,), weight_dtype, align=16)
        out = T.match_buffer(out_ptr, (n, k), dtype, align=16)
        T.device_entry()
        row = T.cta_id([T.cast(n, "int32")])
        thread = T.thread_id([32 * warps])
        sums = T.alloc_buffer((warps,), "float32", scope="shared", align=16)
        held = T.alloc_local((4,), "uint32")
        gains = T.alloc_local((words,), "uint32")
        total: T.float32 = T.float32(0)
        for i in T.unroll(4):
            held[i] = T.uint32(0)
        # Weights come from memory, x from a cache: they are on their way before x is there.
        if thread < vectors:
            for i in T.unroll(words // 4):
                T.ptx["ld.global.v4.b32"](
                    gains[i * 4], gains[i * 4 + 1], gains[i * 4 + 2], gains[i * 4 + 3],
                    weight.ptr_to([thread * LANES + i * (LANES // 2)]),
                )  # fmt: skip
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        if thread < vectors:
            T.ptx["ld.global.v4.b32"](held[0], held[1], held[2], held[3], x.ptr_to([row, thread * LANES]))
        for i in T.unroll(LANES):
            total = total + value(held, i, dtype) * value(held, i, dtype)
        for i in T.unroll(5):
            total = total + hopper.exchange(total, 16 >> i)
        if thread % 32 == 0:
            sums[thread // 32] = total
        T.cuda.cta_sync()
        total = T.float32(0)
        for i in T.unroll(warps):
            total = total + sums[i]
        T.ptx["rsqrt.approx.ftz.f32"](total, total * T.float32(1.0 / k) + T.float32(eps))
        if thread < vectors:
            for i in T.unroll(4):
                T.ptx[to_pair](held[i], gained(held, gains, total, i * 2 + 1), gained(held, gains, total, i * 2))
            T.ptx["st.global.v4.b32"](out.ptr_to([row, thread * LANES]), held[0], held[1], held[2], held[3])

    return hopper.finish(normed, f"rms_norm_{k}", (), dependent_launch)


reference, roofline = norm.rms_norm.reference, norm.rms_norm.roofline
