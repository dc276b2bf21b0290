"""The RMS norm of x inside the kernels for a few rows: what turns a linear into ``llmc.norm_linear``.

(x · inverse · gamma) · weightᵀ is inverse · ((x · gamma) · weightᵀ) with one ``inverse`` = 1 / sqrt(mean(x²) + eps) for each row:
fragments of x are multiplied by gamma where they lie in registers, rounded once as the norm's result would be, and sums are scaled
at the end. Nobody waits for a row's sum of squares before that. It comes from the tensor cores as well: a B fragment of x
[k x 8 rows] is, register for register, the upper half of an A fragment of its transpose, so one multiplication for 16 of k adds to
an 8 x 8 matrix of products of rows, whose diagonal holds the sums. That matrix is one more tile of accumulators, and meets the
other warps' in shared memory as they all do. gamma is fetched with the weights, before the kernel before is done.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.script import tirx as T

from llmc.dialect import norm_linear as dialect
from llmc.schedules.cuda import hopper
from llmc.schedules.protocol import KernelCall

OP = dialect.OP
DTYPES = ("bfloat16",)
"""Of x and gamma. In float16 a product of x and gamma may be too large before it is scaled."""

OFFSETS = (0.0, 1.0)
LOAD_GAMMA = "ld.global.nc.v4.b32"
Expr = Any


def plain(call: KernelCall) -> KernelCall:
    """The linear of a call without its norm: x as it is, no gamma. Any other call as it is."""
    if call.op != OP:
        return call
    attrs = dict(call.attrs)
    op = dialect.linear_op(attrs)
    kept = tuple((name, value) for name, value in call.attrs if name not in ("eps", "offset"))
    return replace(call, op=op, args=(call.args[0], *call.args[2:]), attrs=kept)


def normed(call: KernelCall, eps: float = 1e-5, offset: float = 0.0) -> KernelCall:
    """A linear's call with a norm of its x before it: the inverse of :func:`plain`."""
    x = call.args[0]
    gamma = replace(x, shape=x.shape[1:])
    attrs = tuple(sorted({**dict(call.attrs), "eps": eps, "offset": offset}.items()))
    return replace(call, op=OP, args=(x, gamma, *call.args[1:]), attrs=attrs)


class InputNorm:
    """Device code of the norm for a kernel whose B fragments are ``column_tiles`` times 8 rows of x; of other calls nothing.

    ``slots``: tiles of accumulators that it adds behind the ``results`` that the kernel has (0 or 1). x registers: uint32
    [.., column_tiles, width], gamma's [.., width], which hold the same columns.
    """

    def __init__(self, call: KernelCall, results: int, column_tiles: int) -> None:
        self.here = here = call.op == OP
        self.slots = int(here)
        self.eps = float(call.attr("eps", 0.0))
        shifted = call.attr("offset") == 1.0
        dtype = call.args[0].dtype
        mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{hopper.PTX_TYPE[dtype]}.{hopper.PTX_TYPE[dtype]}.f32"
        multiply, multiply_add = f"mul.{hopper.PTX_TYPE[dtype]}x2", f"fma.rn.{hopper.PTX_TYPE[dtype]}x2"

        @T.inline
        def fetch(held: Expr, base: Expr, gamma: Expr, column: Expr) -> None:
            """16 bytes of gamma to four registers."""
            if here:
                T.ptx[LOAD_GAMMA](held[base], held[base + 1], held[base + 2], held[base + 3], gamma.ptr_to([column]))

        @T.inline
        def apply(acc: Expr, x: Expr, held: Expr, outer: Expr, width: Expr, first: Expr, count: Expr) -> None:
            """Add the squares of ``count`` registers from ``first`` on to the accumulators, and multiply them by gamma."""
            if here:
                for c in T.unroll(column_tiles):
                    for p in T.unroll(count // 2):
                        b = T.meta_var((outer * column_tiles + c) * width + first + p * 2)
                        s = T.meta_var((results * column_tiles + c) * 4)
                        T.ptx[mma](
                            acc[s], acc[s + 1], acc[s + 2], acc[s + 3], x[b], T.uint32(0), x[b + 1], T.uint32(0), x[b], x[b + 1],
                            acc[s], acc[s + 1], acc[s + 2], acc[s + 3],
                        )  # fmt: skip
                    for i in T.unroll(count):
                        at = T.meta_var((outer * column_tiles + c) * width + first + i)
                        if shifted:
                            T.ptx[multiply_add](x[at], x[at], held[outer * width + first + i], x[at])
                        else:
                            T.ptx[multiply](x[at], x[at], held[outer * width + first + i])

        self.fetch, self.apply = fetch, apply
