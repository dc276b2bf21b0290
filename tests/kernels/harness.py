"""Inputs for kernel calls, and running compiled kernels on them."""

from __future__ import annotations

from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import ml_dtypes
import numpy as np
import tvm

from llmc.schedules.protocol import KernelCall
from llmc.targets import cpu
from llmc.targets.base import Target
from llmc.targets.cpu_pipeline import PIPELINE

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32}


def build(kernels: dict[str, tuple[Any, KernelCall]], target: Target, configs: dict[str, dict[str, Any]] | None = None) -> Any:
    """Compile ``{name: (family, call)}`` as one module, each with its default configuration or the one given."""
    functions = {}
    for name, (family, call) in kernels.items():
        config = {axis: values[0] for axis, values in family.space(call, target).items()}
        config |= (configs or {}).get(name, {})
        functions[name] = family.build(call, target, config).with_attr("global_symbol", name)
    return tvm.tirx.build(tvm.IRModule(functions), target=cpu.tvm_target(target), pipeline=PIPELINE)


def tensor(array: np.ndarray) -> Any:
    result = tvm.runtime.empty(array.shape, str(array.dtype))
    result.copyfrom(np.ascontiguousarray(array))
    return result


def run(module: Any, name: str, call: KernelCall, arrays: list[np.ndarray], symbols: dict[str, int]) -> np.ndarray:
    """The result of a kernel that has one; its buffer starts as NaN, so that nothing unwritten goes unnoticed."""
    out = tensor(np.full(call.result.bind(symbols), np.nan, DTYPES[call.result.dtype]))
    module[name](*map(tensor, arrays), out)
    return out.numpy()


def random_arrays(call: KernelCall, symbols: dict[str, int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(spec.bind(symbols)).astype(DTYPES[spec.dtype]) for spec in call.args]


def paged_arrays(call: KernelCall, lengths: list[int], rows: list[int], seed: int) -> tuple[list[np.ndarray], dict[str, int]]:
    """Inputs of llmc.attend: pages in random order, and page numbers far outside behind the end of each sequence."""
    rng = np.random.default_rng(seed)
    page_size = call.attr("page_size")
    used = [-(-length // page_size) for length in lengths]
    pages = rng.permutation(sum(used) + 2)
    table = np.full((len(lengths), max(used) + 1), 10**6, np.int32)
    for s, count in enumerate(used):
        table[s, :count], pages = pages[:count], pages[count:]
    symbols = {"n": sum(rows), "b": len(lengths), "m": table.shape[1], "num_pages": sum(used) + 2, "b+1": len(lengths) + 1}
    arrays = random_arrays(call, symbols, seed)
    arrays[2:5] = [table, np.array(lengths, np.int32), np.cumsum([0, *rows]).astype(np.int32)]
    return arrays, symbols


def error(result: np.ndarray, reference: np.ndarray) -> float:
    """The largest absolute error in units of the largest reference value; NaN if anything is NaN."""
    return float(np.max(np.abs(result.astype(np.float64) - reference)) / max(1e-30, float(np.max(np.abs(reference)))))
