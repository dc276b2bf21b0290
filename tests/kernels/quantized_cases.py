"""Operands of quantized calls for tests: random codes, scales of a size that gives weights of about 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.dialect.quantized_moe import STACKS
from llmc.passes.quantize.scheme import QuantizedTensor, Scheme, stored
from llmc.schedules import quantized_experts
from llmc.schedules.gpu import layout_mma
from llmc.schedules.gpu.quantized_call import how, part_names, specs
from llmc.schedules.layouts import pack_stack
from llmc.schedules.protocol import KernelCall
from tests.kernels.harness import DTYPES

E4M3_NAN = (0x7F, 0xFF)


def random_quantized(scheme: Scheme, o: int, k: int, rng: np.random.Generator) -> QuantizedTensor:
    """Every code, scale, zero point and minimum at random."""
    codes = rng.integers(0, 1 << scheme.bits, (o, k), dtype=np.uint8)
    if scheme.kind == "fp8_e4m3":
        codes[np.isin(codes, E4M3_NAN)] = 0
    groups = scheme.groups(k)
    size = 1.0 / float(np.abs(scheme.values()[np.isfinite(scheme.values())]).max())
    scales = stored(rng.uniform(0.5, 1.5, (o, groups)).astype(np.float32) * size, scheme.scale_dtype)
    zeros = minima = None
    if scheme.offset == "zero_point":
        zeros = rng.integers(0, 1 << scheme.bits, (o, groups), dtype=np.uint8)
    if scheme.offset == "minimum":
        minima = stored(rng.uniform(-1, 1, (o, groups)).astype(np.float32), scheme.scale_dtype)
    return QuantizedTensor(scheme, codes, scales, zeros, minima)


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of bfloat16 as bfloat16; other arrays as they are."""
    return array.view(DTYPES["bfloat16"]) if dtype == "bfloat16" and array.dtype == np.uint16 else array


def operands(call: KernelCall, n: int, seed: int) -> list[np.ndarray]:
    """The call's operands for ``n`` rows, in order."""
    rng = np.random.default_rng(seed)
    parts = layout_mma.pack(random_quantized(how(call), call.attr("o"), call.attr("k"), rng))
    arrays = []
    for name, spec in list(specs(call).items())[:-1]:
        if name in part_names(call):
            arrays.append(as_dtype(parts[name], spec.dtype))
        else:
            arrays.append(rng.standard_normal(spec.bind({"n": n})).astype(DTYPES[spec.dtype]))
    return arrays


def expert_operands(
    call: KernelCall,
    n: int,
    seed: int,
    layouts: Sequence[Any],
    matrices: Callable[[Scheme, int, int, np.random.Generator], QuantizedTensor],
) -> list[np.ndarray]:
    """Operands of a ``llmc.quantized_moe`` for ``n`` rows, in order; ``matrices(scheme, o, k, rng)`` makes a stack of experts, one
    below the other."""
    rng = np.random.default_rng(seed)
    experts, top_k = call.attr("experts"), call.attr("top_k")
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(n)]).astype(np.int32)
    x, weights = (DTYPES[call.args[i].dtype] for i in (0, 2))
    arrays = [rng.standard_normal((n, call.attr("hidden"))).astype(x), ids, rng.uniform(0.1, 1, (n, top_k)).astype(weights)]
    for stack in STACKS:
        o, k = quantized_experts.shape(call, stack)
        layout = quantized_experts.layout_of(call, stack, layouts)
        assert layout is not None
        packed = pack_stack(layout, matrices(quantized_experts.how(call, stack), experts * o, k, rng), experts)
        arrays += [as_dtype(a, s.dtype) for a, s in zip(packed.values(), call.args[len(arrays) :], strict=False)]
    biases = call.args[len(arrays) :]
    return [*arrays, *(rng.standard_normal(b.shape).astype(DTYPES[b.dtype]) for b in biases)]
