"""``llmc.norm_linear`` on sm_90a for every number of rows: the linear's kernels, some of which take the norm themselves.

=========  ==============================================  ==================================================================
rows       kernels                                         why
=========  ==============================================  ==================================================================
5-8        ``gemv`` with the norm inside                   a launch less (:mod:`.input_norm`): at 8 rows 2 % of an 8B model's layer
others     ``row_norm``, then the linear's                 ``ring_gemv`` is faster for fewer rows, wgmma reads x as it lies there
=========  ==============================================  ==================================================================

Measured on an H200 by ``benchmarks/cuda_chain.py``: with the norm inside, ``ring_gemv`` and ``quantized_gemv`` lose more than a
norm takes, for want of registers. Configurations are those of :mod:`.linear_hopper`, and so are the records that say which is best.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from llmc.dialect.norm import rms_norm_reference
from llmc.schedules.cuda import input_norm, linear_call, linear_hopper, row_norm
from llmc.schedules.cuda.host_choice import for_rows, in_sequence
from llmc.schedules.cuda.input_norm import normed, plain
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target

NAME = "cuda.norm_linear"
OP = input_norm.OP
BEFORE = 4
"""Most rows for which the norm comes before a linear of the range ``1-8``."""

SHAPES: dict[str, KernelCall] = {
    "qkv_6144x4096": normed(linear_call.sample(6144, 4096, phase="decode")),
    "edges_136x328": normed(linear_call.sample(136, 328, bias=1, residual=1, phase="decode"), 1e-6),
    "gated_144x264": normed(linear_call.sample(144, 264, activation="silu_gated", phase="decode"), offset=1.0),
}


def measured_as(call: KernelCall) -> tuple[Any, KernelCall]:
    """Records are those of the linear without its norm."""
    return linear_hopper, plain(call)


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or call.attr("scheme") or call.attr("offset") not in input_norm.OFFSETS:
        return None
    if {s.dtype for s in call.args[:2]} - set(input_norm.DTYPES):
        return None
    why = linear_hopper.matches(plain(call), target)
    return None if why is None else f"the norm inside the kernel for {BEFORE + 1} to 8 rows, before the others; {why}"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """Those of the linear."""
    return linear_hopper.space(plain(call), target)


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    linear = plain(call)
    inside = next(c for c in [config["1-8"], *linear_hopper.candidates(linear, "1-8")] if c["kernel"] == "gemv")

    def kernel(chosen: dict[str, Any]) -> Any:
        family = linear_hopper.KERNELS[chosen["kernel"]]
        if chosen.get("norm"):
            return family.build(call, target, chosen)
        return _norm_first(call, family.build(linear, target, chosen), bool(chosen["dependent_launch"]))

    o, k = (int(d) for d in linear.args[1].shape)
    ranges = {"few": BEFORE, **linear_hopper.BUCKETS}
    return for_rows(f"norm_linear_{o}x{k}", ranges, {**config, "few": config["1-8"], "1-8": {**inside, "norm": True}}, kernel)


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
    normal = rms_norm_reference(x, gamma, eps=call.attr("eps"), offset=call.attr("offset"))
    return linear_hopper.reference(plain(call), normal, *arrays)


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """The linear's, and gamma."""
    moved, operations = linear_hopper.roofline(plain(call), **symbols)
    return moved + 2 * int(call.args[1].shape[0]), operations
