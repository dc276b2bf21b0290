"""Kernel calls on the CUDA emulator: what ``tests.kernels.harness`` is for compiled CPU kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target
from tests.kernels.harness import DTYPES, error
from tests.support.cuda_emulator import launchable

_kernels: dict[Any, Callable[..., list[np.ndarray]]] = {}
"""What was built in this process: tests of other numbers of rows, or of a row's bits, run the same kernel again."""

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2, "uint8": 1e-3, "int32": 0.0}
"""Error in units of the largest value of a result that is stored in a dtype (see :func:`tests.kernels.harness.error`); of pages of
codes the share of bytes that differ."""

ERRORS = "LLMC_KERNEL_ERRORS"
"""The variable that names a file for the errors found, a line of JSON each: family, dtype of the result, error
(``tests/kernels_gpu/table.py``)."""


def check(family: Any, case: KernelCall, found: np.ndarray, expected: np.ndarray, dtype: str | None = None) -> None:
    """Compare a result with its reference, within the tolerance of ``dtype`` (default: the result's)."""
    worst = error(found, expected)
    if path := os.environ.get(ERRORS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([family.NAME, case.result.dtype, worst]) + "\n")
    assert worst < TOLERANCE[dtype or case.result.dtype]


def call(
    family: Any,
    case: KernelCall,
    target: Target,
    arrays: list[np.ndarray],
    symbols: dict[str, int],
    config: dict[str, Any] | None = None,
) -> np.ndarray:
    """The result of ``case`` with the default configuration, changed by ``config``; its buffer starts as NaN."""
    return after(family, case, target, arrays, symbols, config)[-1]


def after(
    family: Any,
    case: KernelCall,
    target: Target,
    arrays: list[np.ndarray],
    symbols: dict[str, int],
    config: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """The operands as :func:`call` leaves them, and the result."""
    out = np.full(case.result.bind(symbols), np.nan, DTYPES[case.result.dtype])
    return kernel(family, case, target, config)(*arrays, out)


def kernel(family: Any, case: KernelCall, target: Target, config: dict[str, Any] | None = None) -> Callable[..., list[np.ndarray]]:
    """The kernel of ``case``, built once in a process: called with copies of its arguments, it returns all of them after it."""
    full = {axis: values[0] for axis, values in family.space(case, target).items()} | (config or {})
    key = (family.NAME, repr(case), target, repr(full))
    if key not in _kernels:
        _kernels[key] = launchable(family.build(case, target, full), target)
    return _kernels[key]
