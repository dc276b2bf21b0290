"""What the sm_90a kernels share: TMA and wgmma spellings, barriers on registers, epilogue arithmetic, optional arguments.

The kernels are TIRx: TVMScript with PTX instructions by name (``T.ptx``), one PrimFunc that holds the host's launch code
(tensor maps, grid) and the device code. PTX ISA 8.x, sections "Asynchronous Warpgroup Level Matrix Instructions" and
"Data Movement and Conversion Instructions: Tensor copy".
"""

from __future__ import annotations

from collections.abc import Iterable
from math import e, log2, pi, sqrt
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from tvm import tirx
from tvm.script import tirx as T

from llmc.targets.base import Target

Expr = Any
TMA_LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
TMA_LOAD_3D = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
TMA_STORE = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"
SWIZZLE_128B = 3
"""``CU_TENSOR_MAP_SWIZZLE_128B``, and the swizzle field of :func:`T.cuda.wgmma.encode_matrix_descriptor`."""

L2_PROMOTION_128B = 2
ATOM = 64
"""Columns of a swizzled tile: 128 bytes of a 16-bit type."""

FULL_WARP = 0xFFFFFFFF
PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}
LOG2E = log2(e)

REGISTER_FENCE = """
__device__ __forceinline__ void register_fence(float& r) { asm volatile("" : "+f"(r) :: "memory"); }
"""
"""Keeps the compiler from moving uses of an accumulator across the wait for the asynchronous instruction that writes it."""

GRID_DEPENDENCY = {"tirx.kernel_launch_params": ["tirx.use_programtic_dependent_launch"]}
"""Programmatic dependent launch (the tag is spelled so in TVM): the grid may start while the one before it drains."""


def is_hopper(target: Target) -> bool:
    """Whether the target runs wgmma: ``sm_90a`` and nothing else, the instructions are architecture specific."""
    return target.kind == "cuda" and target.mcpu == "sm_90a"


def packed_convert(dtype: str) -> str:
    """The instruction that rounds two float32 values to a pair of ``dtype``, the second operand in the lower half."""
    return f"cvt.rn.{PTX_TYPE[dtype]}x2.f32"


def encode_tensor_map(tensor_map: Expr, dtype: str, data: Expr, *, columns: Expr, rows: Expr, box_rows: int) -> Expr:
    """Host code: describe a row-major 16-bit matrix to TMA, in boxes of ``box_rows`` x :data:`ATOM`, swizzled, zero outside."""
    return T.call_packed(
        "runtime.cuTensorMapEncodeTiled", tensor_map, dtype, 2, data, columns, rows, columns * 2, ATOM, box_rows, 1, 1, 0,
        SWIZZLE_128B, L2_PROMOTION_128B, 0,
    )  # fmt: skip


def encode_line_map(tensor_map: Expr, dtype: str, data: Expr, *, columns: int, rows: Expr, box_lines: int, box_rows: int) -> Expr:
    """Host code: the same for boxes of ``box_rows`` rows and ``box_lines`` lines of :data:`ATOM` columns, which the map has as an
    axis of their own: [rows, lines, columns of a line]. ``columns`` is a multiple of :data:`ATOM`.
    """
    return T.call_packed(
        "runtime.cuTensorMapEncodeTiled", tensor_map, dtype, 3, data, ATOM, columns // ATOM, rows, ATOM * 2, columns * 2, ATOM,
        box_lines, box_rows, 1, 1, 1, 0, SWIZZLE_128B, L2_PROMOTION_128B, 0,
    )  # fmt: skip


def finish(function: Any, name: str, unused: Iterable[str] = (), dependent_launch: bool = True) -> Any:
    """Name a TIRx PrimFunc, mark it scheduled, and drop the parameters that its body does not use."""
    drop = set(unused)
    kept = [p for p in function.params if p.name not in drop]
    function = tirx.PrimFunc(kept, function.body, function.ret_type, function.attrs)
    attrs = {"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True}
    for key, value in {**attrs, **(GRID_DEPENDENCY if dependent_launch else {})}.items():
        function = function.with_attr(key, value)
    return function


def shuffle(value: Expr, source: Expr) -> Expr:
    """The value that thread ``source`` of the warp holds."""
    return T.tvm_warp_shuffle(T.uint32(FULL_WARP), value, source, 32, 32)


def exchange(value: Expr, distance: int) -> Expr:
    """The value of the thread whose index in the warp differs in bit ``distance``."""
    return T.tvm_warp_shuffle_xor(T.uint32(FULL_WARP), value, distance, 32, 32)


@T.inline
def fence(accumulators: Any, count: Any) -> None:
    """See :data:`REGISTER_FENCE`."""
    for i in T.unroll(count):
        T.cuda.func_call("register_fence", accumulators[i], source_code=REGISTER_FENCE, return_type="void")


@T.inline
def release(empty: Any, stage: Any, blocks: Any, local: Any, rank: Any, remote: Any) -> None:
    """Hand a stage back to all who copy into it: of a warpgroup's threads, numbered by ``local``, one for each of ``blocks`` blocks
    of a cluster arrives at the barrier ``empty[stage]`` of the block with its ``rank``. ``remote``: a register of scratch.
    """
    if blocks > 1:
        if local < blocks:
            T.ptx.mapa.shared__cluster.u32(remote[0], T.cuda.cvta_generic_to_shared(empty.ptr_to([stage])), T.cast(rank, "uint32"))
            T.ptx.mbarrier.arrive.shared__cluster.b64(remote[0])
    else:
        if local == 0:
            T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([stage]), T.uint32(1))


@T.inline
def sigmoid(out: Expr, x: Expr) -> None:
    """out = 1 / (1 + exp(-x)), absolute error below 1e-6; the limits 0 and 1 are exact."""
    T.ptx["ex2.approx.ftz.f32"](out, x * T.float32(-LOG2E))
    T.ptx["rcp.approx.ftz.f32"](out, out + T.float32(1))


def erf_polynomial(t: Expr) -> Expr:
    """(a1 t + a2 t² + ... + a5 t⁵) / 2 of formula 7.1.26."""
    value = tirx.const(0.0, "float32")
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        value = (value + tirx.const(a / 2, "float32")) * t
    return value


@T.inline
def normal_cdf(out: Any, x: Expr) -> None:
    """out[0] = (1 + erf(x / sqrt 2)) / 2, absolute error below 1e-6 (Abramowitz & Stegun, 7.1.26); out[1] is scratch."""
    T.ptx["rcp.approx.ftz.f32"](out[0], T.float32(1) + T.abs(x) * T.float32(0.3275911 * sqrt(0.5)))
    T.ptx["ex2.approx.ftz.f32"](out[1], x * x * T.float32(-0.5 * LOG2E))
    out[1] = out[1] * erf_polynomial(out[0])
    out[0] = T.if_then_else(x < T.float32(0), out[1], T.float32(1) - out[1])


ACTIVATIONS = ("none", "silu", "relu", "relu2", "gelu", "gelu_tanh")


def gelu_tanh_argument(x: Expr) -> Expr:
    """2u with gelu_tanh(x) = x · sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³): tanh(u) = 2 sigmoid(2u) - 1."""
    return x * (tirx.const(2 * sqrt(2 / pi), "float32") + x * x * tirx.const(2 * sqrt(2 / pi) * 0.044715, "float32"))


@T.inline
def activate(activation: Any, values: Any, i: Any, scratch: Any) -> None:
    """values[i] = activation(values[i]) in float32 registers, by name (:data:`ACTIVATIONS`); ``scratch``: two registers."""
    if activation == "silu":
        sigmoid(scratch[0], values[i])
        values[i] = values[i] * scratch[0]
    elif activation == "gelu_tanh":
        sigmoid(scratch[0], gelu_tanh_argument(values[i]))
        values[i] = values[i] * scratch[0]
    elif activation == "gelu":
        normal_cdf(scratch, values[i])
        values[i] = values[i] * scratch[0]
    elif activation == "relu":
        values[i] = T.max(values[i], T.float32(0))
    elif activation == "relu2":
        values[i] = T.max(values[i], T.float32(0)) * T.max(values[i], T.float32(0))
