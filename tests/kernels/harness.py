"""Inputs for kernel calls, and running compiled kernels on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import ml_dtypes
import numpy as np
import tvm

from llmc.dialect.paged import append_reference
from llmc.dialect.rope_append import key_dim
from llmc.schedules.protocol import KernelCall
from llmc.targets import cpu
from llmc.targets.base import Target

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32, "uint8": np.uint8}


def build(kernels: dict[str, tuple[Any, KernelCall]], target: Target, configs: dict[str, dict[str, Any]] | None = None) -> Any:
    """Compile ``{name: (family, call)}`` as one module, each with its default configuration or the one given."""
    functions = {}
    for name, (family, call) in kernels.items():
        config = {axis: values[0] for axis, values in family.space(call, target).items()}
        config |= (configs or {}).get(name, {})
        functions[name] = family.build(call, target, config).with_attr("global_symbol", name)
    return cpu.build_kernels(tvm.IRModule(functions), target)


class Kernels:
    """Kernels by name, each compiled as a module of its own when it is first asked for: a process that runs some of a file's tests
    compiles what those call. ``kernels``, ``target`` and ``configs`` are those of :func:`build`."""

    def __init__(
        self,
        kernels: dict[str, tuple[Any, KernelCall]],
        target: Target,
        configs: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self._kernels, self._target, self._configs = kernels, target, configs
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._built:
            self._built[name] = build({name: self._kernels[name]}, self._target, self._configs)
        return self._built[name][name]


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
    """Standard normal operands; pages of codes hold those of standard normal keys and values."""
    rng = np.random.default_rng(seed)
    arrays = []
    for spec in call.args:
        if spec.dtype == "uint8":
            arrays.append(quantized_pages(call, spec.bind(symbols), rng))
        else:
            arrays.append(rng.standard_normal(spec.bind(symbols)).astype(DTYPES[spec.dtype]))
    return arrays


def quantized_pages(call: KernelCall, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Pages in which every slot is filled."""
    num_pages, heads, _ = shape
    page_size, scheme = call.attr("page_size"), call.attr("kv_scheme")
    d, dv = head_dims(call)
    k, v = (rng.standard_normal((num_pages * page_size, heads, size)) for size in (d, dv))
    return append_reference(k, v, np.arange(len(k)), np.zeros(shape, np.uint8), page_size=page_size, kv_scheme=scheme)


def head_dims(call: KernelCall) -> tuple[int, int]:
    """The sizes of a key and of a value in the pages of a call."""
    if call.op == "llmc.append":
        return call.args[0].shape[2], call.args[1].shape[2]
    if call.op == "llmc.attend":
        return call.args[0].shape[2], call.attr("v_dim")
    dv = call.attr("v_dim")
    return key_dim(call.args[0].shape[1], call.attr("heads"), call.args[4].shape[1], dv), dv


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


def page_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The error of pages that a kernel filled; of codes the share of bytes that differ, as codes next to a tie round either way."""
    return float((found != expected).mean()) if expected.dtype == np.uint8 else error(found, expected.astype(np.float64))


def error(result: np.ndarray, reference: np.ndarray) -> float:
    """The largest absolute error in units of the largest reference value; NaN if anything is NaN."""
    return float(np.max(np.abs(result.astype(np.float64) - reference)) / max(1e-30, float(np.max(np.abs(reference)))))
