"""``llmc.norm_linear`` on sm_90a for every number of rows: the linear's kernels, which for a few rows take the norm themselves.

=====  =============================================  ======================================================
rows   kernels                                        why
=====  =============================================  ======================================================
1-16   ``ring_gemv``, ``gemv``, ``quantized_gemv``    x passes through registers: a launch less (:mod:`.input_norm`)
more   ``row_norm``, then the linear's                wgmma reads x as it lies in shared memory
=====  =============================================  ======================================================

Configurations are those of the linear without the norm, :mod:`.linear_hopper` or :mod:`.quantized_hopper`, and so are the records
that say which is best: the norm changes little about it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.dialect.norm import rms_norm_reference
from llmc.schedules.cuda import input_norm, linear_call, linear_hopper, quantized_hopper, row_norm
from llmc.schedules.cuda.host_choice import for_rows, in_sequence
from llmc.schedules.cuda.input_norm import normed, plain
from llmc.schedules.gpu.quantized_call import make
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.norm_linear"
OP = input_norm.OP
INSIDE = ("ring_gemv", "gemv", "quantized_gemv")
"""Kernels that take the norm themselves."""

SHAPES: dict[str, KernelCall] = {
    "qkv_6144x4096": normed(linear_call.sample(6144, 4096, phase="decode")),
    "gate_up_28672x4096_int4": normed(make(28672, 4096, "int4_g128", activation="silu_gated")),
    "edges_136x328": normed(linear_call.sample(136, 328, bias=1, residual=1, phase="decode"), 1e-6),
    "gated_144x264": normed(linear_call.sample(144, 264, activation="silu_gated", phase="decode"), offset=1.0),
    "small_64x136_int4": normed(make(64, 136, "int4_g64")),
}


def linear_of(call: KernelCall) -> tuple[Any, KernelCall]:
    """The family and the call of the linear without its norm."""
    return quantized_hopper if call.attr("scheme") else linear_hopper, plain(call)


measured_as = linear_of


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or call.attr("offset") not in input_norm.OFFSETS:
        return None
    if {s.dtype for s in call.args[:2]} - set(input_norm.DTYPES):
        return None
    family, linear = linear_of(call)
    why = family.matches(linear, target)
    return None if why is None else f"the norm inside the kernels for up to 16 rows, before the others; {why}"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """Those of the linear."""
    family, linear = linear_of(call)
    return dict(family.space(linear, target))


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    family, linear = linear_of(call)

    def kernel(chosen: dict[str, Any]) -> Any:
        inside = family.KERNELS[chosen["kernel"]].NAME.rpartition(".")[2] in INSIDE
        built = family.KERNELS[chosen["kernel"]].build(call if inside else linear, target, chosen)
        return built if inside else _norm_first(call, built, bool(chosen["dependent_launch"]))

    o, k = linear.attr("o") or linear.args[1].shape[0], call.args[0].shape[1]
    return for_rows(f"norm_linear_{o}x{k}", family.BUCKETS, config, kernel)


def _norm_first(call: KernelCall, linear: Any, dependent_launch: bool) -> Any:
    """``linear`` of the rows that :mod:`.row_norm` writes to a workspace before."""
    (_, k), dtype = call.args[0].shape, call.args[0].dtype
    n = tirx.Var("n", "int64")
    specs = {f"operand{i}": spec for i, spec in enumerate((*call.args, call.result))}
    operands = {name: (tuple(n if d == "n" else d for d in spec.shape), spec.dtype) for name, spec in specs.items()}
    x, gamma, *others = operands
    norm = row_norm.kernel(int(k), dtype, float(call.attr("eps")), float(call.attr("offset")), dependent_launch)
    steps = [(norm, (x, gamma, "rows")), (linear, ("rows", *others))]
    return in_sequence("norm_linear", operands, {"rows": ((n, k), dtype)}, steps)


def reference(call: KernelCall, x: np.ndarray, gamma: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
    """The linear of the norm, in float64 NumPy."""
    family, linear = linear_of(call)
    return family.reference(linear, rms_norm_reference(x, gamma, eps=call.attr("eps"), offset=call.attr("offset")), *arrays)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """The linear's, and gamma."""
    family, linear = linear_of(call)
    moved, operations = family.roofline(linear, **symbols)
    return moved + 2 * int(call.args[1].shape[0]), operations
