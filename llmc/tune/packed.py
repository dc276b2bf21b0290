"""Quantized weights as inputs: random matrices, rounded and packed as compiling does it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from llmc import targets
from llmc.dialect.quantized_moe import STACKS, shape_of
from llmc.errors import UnsupportedError
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, scheme
from llmc.schedules import layouts
from llmc.schedules.protocol import KernelCall


@lru_cache(maxsize=1)
def packed_weight(call: KernelCall, seed: int = 0) -> tuple[np.ndarray, ...]:
    """The parts of a random weight in the call's layout, in the order of its operands.

    Raises UnsupportedError for an unknown layout.
    """
    o, k = int(call.attr("o")), int(call.attr("k"))
    return _packed(_layout(str(call.attr("layout"))), str(call.attr("scheme")), o, k, np.random.default_rng(seed))


@lru_cache(maxsize=1)
def packed_experts(call: KernelCall, seed: int = 0) -> tuple[np.ndarray, ...]:
    """The same for the stacks of random experts of an ``llmc.quantized_moe``."""
    rng, parts = np.random.default_rng(seed), []
    for stack in STACKS:
        layout, how = _layout(str(call.attr(f"{stack}_layout"))), str(call.attr(f"{stack}_scheme"))
        o, k = shape_of(dict(call.attrs), stack)
        each = [_packed(layout, how, o, k, rng) for _ in range(int(call.attr("experts")))]
        parts += [np.stack(part) for part in zip(*each, strict=True)]
    return tuple(parts)


def _packed(layout: layouts.WeightLayout, name: str, o: int, k: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    how = scheme(name)
    if how.super_group:
        weight = _two_level(how, o, k, rng)
    else:
        weight = quantize(rng.standard_normal((o, k), np.float32) * np.float32(k**-0.5), how)
    parts = layout.pack(weight).values()
    return tuple(part.view(np.uint16) if part.dtype.name == "bfloat16" else part for part in parts)  # as it is stored


def _two_level(how: Scheme, o: int, k: int, rng: np.random.Generator) -> QuantizedTensor:
    """Any codes and scales: nothing is rounded to these schemes, files have them. Values of about k^-1/2."""
    signed, top, groups = how.offset == "none", 1 << how.sub_bits, (o, how.groups(k))
    unit = 4 * k**-0.5 / (top << how.bits)

    def factors() -> np.ndarray:
        return rng.uniform(unit / 2, unit, (o, -(-k // how.super_group))).astype(np.float16)

    codes = rng.integers(0, 1 << how.bits, (o, k)).astype(np.uint8)
    scales = (rng.integers(0, top, groups) - (top // 2 if signed else 0)).astype(np.int8)
    found = QuantizedTensor(how, codes, scales, super_scales=factors())
    if not signed:
        found.minima, found.super_minima = rng.integers(0, top, groups).astype(np.int8), factors()
    return found


def _layout(name: str) -> layouts.WeightLayout:
    kind = name.partition(".")[0]
    kinds = ("rocm", "metal", "opencl", "cuda") if kind == "gpu" else (kind,)
    for spec in targets.known_specs():
        if spec.partition(":")[0] in kinds and spec != "cuda":  # plain "cuda" asks for a GPU
            for layout in layouts.of_target(targets.parse(spec)):
                if name == layout.NAME:
                    return layout
    raise UnsupportedError(f"tuning knows no weight layout {name!r}: leave its kernels out with --kernels")
