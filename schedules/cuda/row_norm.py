"""RMS norm without weights of rows in 16-bit types, as a TIRx kernel: for PrimFuncs that launch another behind it on sm_90a.

A thread block takes a row and keeps it in registers. Where a norm is a call of its own the portable family computes it, whose
kernels go through another lowering and cannot share a PrimFunc with these. Statistics are float32.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from llmc.schedules.cuda import hopper

LANES = 8
"""16-bit values of a 16-byte access."""

MOST_THREADS = 512
Expr = Any


def value(held: Expr, i: Any, dtype: str) -> Expr:
    """The i-th 16-bit value of some registers, float32."""
    half = T.cast(T.shift_right(held[i // 2], T.uint32(16) * T.cast(i % 2, "uint32")), "uint16")
    return T.cast(T.reinterpret(dtype, half), "float32")


def kernel(k: int, dtype: str, eps: float, dependent_launch: bool) -> Any:
    """``norm(x [n, k], out [n, k])``; k is a multiple of :data:`LANES`."""
    vectors = k // LANES
    threads = min(-(-vectors // 32) * 32, MOST_THREADS)
    steps, warps = -(-vectors // threads), threads // 32
    to_pair = hopper.packed_convert(dtype)

    @T.prim_func
    def norm(x_ptr: T.handle, out_ptr: T.handle) -> None:
        n = T.int64()
        x = T.match_buffer(x_ptr, (n, k), dtype, align=16)
        out = T.match_buffer(out_ptr, (n, k), dtype, align=16)
        T.device_entry()
        row = T.cta_id([T.cast(n, "int32")])
        thread = T.thread_id([threads])
        sums = T.alloc_buffer((warps,), "float32", scope="shared", align=16)
        x_regs = T.alloc_local((steps * 4,), "uint32")
        if dependent_launch:
            T.ptx.griddepcontrol.launch_dependents()
        for i in T.unroll(steps * 4):
            x_regs[i] = T.uint32(0)
        if dependent_launch:
            T.ptx.griddepcontrol.wait()
        for s in T.unroll(steps):
            if s * threads + thread < vectors:
                T.ptx["ld.global.v4.b32"](
                    x_regs[s * 4], x_regs[s * 4 + 1], x_regs[s * 4 + 2], x_regs[s * 4 + 3],
                    x.ptr_to([row, (s * threads + thread) * LANES]),
                )  # fmt: skip
        total: T.float32 = T.float32(0)
        for i in T.unroll(steps * LANES):
            total = total + value(x_regs, i, dtype) * value(x_regs, i, dtype)
        for i in T.unroll(5):
            total = total + hopper.exchange(total, 16 >> i)
        if thread % 32 == 0:
            sums[thread // 32] = total
        T.cuda.cta_sync()
        total = T.float32(0)
        for i in T.unroll(warps):
            total = total + sums[i]
        T.ptx["rsqrt.approx.ftz.f32"](total, total * T.float32(1.0 / k) + T.float32(eps))
        for s in T.unroll(steps):
            if s * threads + thread < vectors:
                for i in T.unroll(4):
                    low = T.meta_var((s * 4 + i) * 2)
                    T.ptx[to_pair](x_regs[s * 4 + i], value(x_regs, low + 1, dtype) * total, value(x_regs, low, dtype) * total)
                T.ptx["st.global.v4.b32"](
                    out.ptr_to([row, (s * threads + thread) * LANES]),
                    x_regs[s * 4], x_regs[s * 4 + 1], x_regs[s * 4 + 2], x_regs[s * 4 + 3],
                )  # fmt: skip

    return hopper.finish(norm, f"row_norm_{k}", (), dependent_launch)
