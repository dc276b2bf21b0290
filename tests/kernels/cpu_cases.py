"""Operands of every CPU kernel for tests that run them all, whatever runs them: this processor or another one under an emulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc import targets
from llmc.runtime.host import host
from llmc.schedules.cpu import FAMILIES, attend, layout_panel, layout_plain, quantized_linear, quantized_moe
from llmc.schedules.protocol import KernelCall
from llmc.targets.base import Target
from llmc.targets.cpu import ARM
from tests.kernels.harness import build, paged_arrays, tensor
from tests.kernels.quantized_cases import expert_operands
from tests.kernels.test_cpu_quantized import arrays_of, quantized
from tests.kernels.test_cpu_quantized_moe import EXACT, matrices
from tests.kernels_gpu import cases as gpu
from tests.kernels_gpu.cases import arguments, errors
from tests.quantize.weights import linear_arrays, random_matrix
from tests.support import amx, other_processor

TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3, "uint8": 1e-3, "int32": 0.0}
"""A narrow dtype may round a value next to a tie either way: one unit in its last place."""


def tolerance(family: Any, label: str, dtype: str) -> float:
    """The most :func:`errors` may find. Between the two products of quantized experts activations are rounded to 8 bits."""
    return 3e-2 if family is quantized_moe and label not in EXACT else TOLERANCE[dtype]


def symbol(family: Any, label: str) -> str:
    """A name for the kernel of a case."""
    return f"{family.NAME}_{label}".replace(".", "_")


def operands(family: Any, call: KernelCall, n: int, seed: int = 3) -> tuple[list[np.ndarray], dict[str, int]]:
    """Random inputs for ``n`` rows and the values of the symbols. Products with quantized weights get activations that 8 bits hold:
    their rounding is another test's matter."""
    if family is attend:
        rows = [1, 1, 1] if call.phase == "decode" else [20, 5, 1]
        return paged_arrays(call, [140, 5, 40], rows, seed)
    if family is quantized_linear:
        return arrays_of(call, n, seed, exact=True), {"n": n}
    if call.op == quantized_linear.OP:
        return linear_arrays(call, layout_plain, n, seed), {"n": n}
    if family is quantized_moe:
        return expert_operands(call, n, seed, quantized_moe.LAYOUTS, matrices), {"n": n}
    if call.op == "llmc.quantized_take":
        o, k, panels = call.attr("o"), call.attr("k"), call.attr("layout") == layout_panel.NAME
        how = call.attr("scheme")
        parts = layout_panel.pack(quantized(how, o, k)) if panels else layout_plain.pack(random_matrix(how, o, k))
        return [np.array([o - 1, 0, 3, o - 1, 8], np.int32), *parts.values()], {"n": 5}
    arrays, symbols = gpu.operands(family, call, n, seed)
    if call.op == "llmc.topk":
        arrays[0][0] = np.round(arrays[0][0])  # ties
    return arrays, symbols


def cases_of(target: Target) -> list[tuple[Any, str]]:
    """Every shape of every family that has a kernel for it on ``target``."""
    return [(family, label) for family in FAMILIES for label, call in family.SHAPES.items() if family.matches(call, target)]


def requests(rows: tuple[int, ...], target: Target) -> list[tuple[Any, str, list[np.ndarray], list[np.ndarray]]]:
    """Every case with these numbers of rows: family, label, operands, and the kernel's arguments."""
    found = []
    for family, label in cases_of(target):
        call = family.SHAPES[label]
        for n in rows:
            arrays, symbols = operands(family, call, n)
            found.append((family, label, arrays, arguments(family, call, arrays, symbols)))
    return found


def results(module: Any, target: Target, calls: Sequence[tuple[str, Sequence[np.ndarray]]], folder: Path) -> list[list[np.ndarray]]:
    """Each call's arrays after it, on this processor or, for 64-bit Arm, on an emulated one. ``folder`` is for its files."""
    if target.triple == ARM and host().machine != "aarch64":
        return other_processor.run(module, target, calls, folder)
    amx.use(target)
    after = []
    for name, arrays in calls:
        tensors = [tensor(a) for a in arrays]
        module[name](*tensors)
        after.append([t.numpy() for t in tensors])
    return after


def worst(spec: str, rows: tuple[int, ...], folder: Path) -> dict[tuple[str, str, str], float]:
    """(family's name, label, dtype of a result) -> its largest error, of every case compiled for ``spec`` and run."""
    target = targets.parse(spec)
    module = build({symbol(f, label): (f, f.SHAPES[label]) for f, label in cases_of(target)}, target)
    cases, found = requests(rows, target), {}
    after = results(module, target, [(symbol(f, label), args) for f, label, _, args in cases], folder)
    for (family, label, arrays, _), changed in zip(cases, after, strict=True):
        for dtype, value in errors(family, family.SHAPES[label], arrays, changed).items():
            key = (family.NAME, label, dtype)
            found[key] = max(found.get(key, 0.0), value)
    return found
