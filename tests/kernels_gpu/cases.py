"""Operands of portable kernels for their tests, whatever runs them, and the error of what came back."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.passes.quantize.scheme import scheme
from llmc.schedules.gpu import append, attend_decode, attend_extend, layout_mma, moe, quantized_moe, rope_append
from llmc.schedules.protocol import KernelCall
from tests.kernels.harness import DTYPES, error, page_error, paged_arrays, random_arrays
from tests.kernels.quantized_cases import as_dtype, expert_operands, random_quantized
from tests.kernels.quantized_cases import operands as quantized_operands

PAGES = 6
TAKEN = 5
"""Rows of an embedding."""

SLOTS = {append.OP: 2, rope_append.OP: 3}
"""Operators that write pages -> the operand that says where to."""


def rows_of(family: Any, call: KernelCall) -> int:
    """Rows to check a kernel with: more than one tile has, for those of many rows."""
    return 70 if call.phase == "extend" and "gemm" in family.NAME else 7


def operands(family: Any, call: KernelCall, n: int, seed: int = 3) -> tuple[list[np.ndarray], dict[str, int]]:
    """Random inputs for ``n`` rows and the values of the symbols; attention has sequences of its own, of several lengths."""
    if family is attend_decode:
        return paged_arrays(call, [131, 1, 40], [1, 1, 1], seed)
    if family is attend_extend:  # a chunk behind a prefix, a fresh prompt, a sequence without rows and a single row
        return paged_arrays(call, [140, 5, 8, 9], [20, 5, 0, 1], seed)
    if call.op == "llmc.quantized_linear":
        return quantized_operands(call, n, seed), {"n": n}
    if family is quantized_moe:
        return expert_operands(call, n, seed, quantized_moe.LAYOUTS, random_quantized), {"n": n}
    if call.op == "llmc.quantized_take":
        return _take_operands(call, seed), {"n": TAKEN}
    symbols, rng = {"n": n, "num_pages": PAGES, "b": 3, "b+1": 4}, np.random.default_rng(seed)
    arrays = random_arrays(call, symbols, seed)
    if call.op in SLOTS:
        slots = rng.permutation(PAGES * call.attr("page_size"))[:n].astype(np.int32)
        slots[n // 2 : n // 2 + (n > 1)] = -1  # a row of padding has no slot
        arrays[SLOTS[call.op]] = slots
    if call.op == moe.OP:
        experts = call.args[3].shape[0]
        arrays[1] = np.stack([rng.permutation(experts)[: call.attr("top_k")] for _ in range(n)]).astype(np.int32)
    return arrays, symbols


def _take_operands(call: KernelCall, seed: int) -> list[np.ndarray]:
    how, o, k = scheme(call.attr("scheme")), call.attr("o"), call.attr("k")
    parts = layout_mma.pack(random_quantized(how, o, k, np.random.default_rng(seed)))
    packed = [as_dtype(parts[name], spec.dtype) for name, spec in layout_mma.parts(how, o, k).items()]
    return [np.array([o - 1, 0, 3, o - 1, 8], np.int32), *packed]


def result_buffer(call: KernelCall, symbols: dict[str, int]) -> np.ndarray:
    """What a result is before the kernel runs: NaN or -1, so that nothing unwritten goes unnoticed."""
    dtype = DTYPES[call.result.dtype]
    return np.full(call.result.bind(symbols), -1 if dtype == np.int32 else np.nan, dtype)


def arguments(family: Any, call: KernelCall, arrays: list[np.ndarray], symbols: dict[str, int]) -> list[np.ndarray]:
    """What the kernel is called with: the operands, and room for a result that is not one of them."""
    return arrays if call.op == append.OP else [*arrays, result_buffer(call, symbols)]


def errors(family: Any, call: KernelCall, arrays: list[np.ndarray], after: list[np.ndarray]) -> dict[str, float]:
    """For the dtype of each result its error (:func:`tests.kernels.harness.error`) after the kernel changed its arguments."""
    expected = family.reference(call, *arrays)
    if call.op == append.OP:
        return {call.result.dtype: page_error(after[3], expected)}
    if call.op == rope_append.OP:
        queries, pages = expected
        untouched = pages == arrays[4]
        if pages.dtype == np.uint8:  # a code may be what was there before, and next to a tie round to another
            opposite = ~arrays[4]
            untouched &= family.reference(call, *arrays[:4], opposite, *arrays[5:])[1] == opposite
        assert np.array_equal(after[4][untouched], arrays[4][untouched]), "the kernel wrote beside its slots"
        found = {call.args[4].dtype: page_error(after[4], pages)}
        found[call.result.dtype] = max(error(after[-1], queries), found.get(call.result.dtype, 0.0))
        return found
    return {call.result.dtype: error(after[-1], expected)}
