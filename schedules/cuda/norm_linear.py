"""``llmc.norm_linear`` on sm_90a for every number of rows: the linear's kernels, those for few rows with the norm inside.

==================  ===================================  ==========================================================
rows                kernels                              why
==================  ===================================  ==========================================================
1-8                 the linear's, with the norm inside   a launch less (:mod:`.input_norm`)
1-2, quantized      the linear's, with the norm inside   the same; ``quantized_gemv`` adds up squares block by block
others              ``row_norm``, then the linear's      wgmma reads x as it lies in memory
==================  ===================================  ==========================================================

Configurations are those of :mod:`.linear_hopper` or :mod:`.quantized_hopper`, and so are the records that say which is best.
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
INSIDE = {"ring_gemv": 8, "gemv": 8, "ring": 8}
"""Kernels that take the norm -> most rows for which they do."""

FEW = 2
"""Most rows for which ``quantized_gemv`` does."""

SHAPES: dict[str, KernelCall] = {
    "qkv_6144x4096": normed(linear_call.sample(6144, 4096, phase="decode")),
    "edges_136x328": normed(linear_call.sample(136, 328, bias=1, residual=1, phase="decode"), 1e-6),
    "gated_144x264_f16": normed(linear_call.sample(144, 264, "float16", activation="silu_gated", phase="decode")),
    "gate_up_28672x4096_int4": normed(make(28672, 4096, "int4_g128", activation="silu_gated")),
    "edges_136x328_int8": normed(make(136, 328, "int8", bias=1, residual=1)),
    "gate_up_28672x4096_int8": normed(make(28672, 4096, "int8", activation="silu_gated")),
}


def measured_as(call: KernelCall) -> tuple[Any, KernelCall]:
    """Records are those of the linear without its norm."""
    return quantized_hopper if call.attr("scheme") else linear_hopper, plain(call)


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP:
        return None
    family, linear = measured_as(call)
    why: str | None = family.matches(linear, target)
    return None if why is None else f"the norm inside the kernels for few rows, before those for more; {why}"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """Those of the linear."""
    family, linear = measured_as(call)
    found: dict[str, list[Any]] = family.space(linear, target)
    return found


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    """Of a configuration of some of the ranges of rows (:mod:`llmc.schedules.parts`): for these alone."""
    family, linear = measured_as(call)

    def kernel(chosen: dict[str, Any]) -> Any:
        of_range = family.KERNELS[chosen["kernel"]]
        if chosen.get("norm"):
            return of_range.build(call, target, chosen)
        return _norm_first(call, of_range.build(linear, target, chosen), bool(chosen["dependent_launch"]))

    ranges: dict[str, int | None] = {}
    chosen: dict[str, Any] = {"dependent_launch": config.get("dependent_launch", True)}
    before = 0
    for axis, most in family.buckets(linear).items():
        if axis in config:
            inside = _most_inside(linear, config[axis])
            if inside > before:
                few = inside if most is None else min(inside, most)
                ranges[f"{axis}, norm"], chosen[f"{axis}, norm"] = few, {**config[axis], "norm": True}
            if most is None or inside < most:
                ranges[axis], chosen[axis] = most, config[axis]
        before = most or before
    o, k = (linear.attr("o"), linear.attr("k")) if linear.attr("scheme") else linear.args[1].shape
    return for_rows(f"norm_linear_{o}x{k}", ranges, chosen, kernel)


def _most_inside(linear: KernelCall, chosen: dict[str, Any]) -> int:
    """Rows up to which a configuration's kernel takes the norm; 0: it does not."""
    name = chosen["kernel"]
    return FEW if name == "gemv" and linear.attr("scheme") else INSIDE.get(name, 0)


def _norm_first(call: KernelCall, linear: Any, dependent_launch: bool) -> Any:
    """``linear`` of the rows that :mod:`.row_norm` writes to a workspace before."""
    (_, k), dtype = call.args[0].shape, call.args[0].dtype
    n = tirx.Var("n", "int64")
    specs = {f"operand{i}": spec for i, spec in enumerate((*call.args, call.result))}
    operands = {name: (tuple(n if d == "n" else d for d in spec.shape), spec.dtype) for name, spec in specs.items()}
    x, *others = operands
    norm = row_norm.kernel(int(k), dtype, float(call.attr("eps")), dependent_launch)
    steps = [(norm, (x, "rows")), (linear, ("rows", *others))]
    return in_sequence("norm_linear", operands, {"rows": ((n, k), dtype)}, steps)


def reference(call: KernelCall, x: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
    """The linear of the norm, in float64 NumPy."""
    family, linear = measured_as(call)
    normal = rms_norm_reference(x, np.ones(x.shape[-1], np.float32), eps=call.attr("eps"), offset=0.0)
    found: np.ndarray = family.reference(linear, normal, *arrays)
    return found


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """The linear's."""
    family, linear = measured_as(call)
    found: tuple[int, int] = family.roofline(linear, **symbols)
    return found
