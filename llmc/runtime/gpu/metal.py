"""Run a compiled module on an Apple GPU: TVM's Metal runtime holds the memory and starts the kernels.

Metal's memory has handles and no addresses that could be counted from, so every tensor is one of TVM's own, made once for each
shape, and a step's arrays are copied into theirs. Nothing here is Metal's alone: it goes for any device that TVM's runtime drives,
which is how it is tested on a processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.errors import InternalError
from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import Step
from llmc.runtime.executor import page_shapes
from llmc.runtime.library import load_metal_runtime
from llmc.runtime.tensors import zeros
from llmc.runtime.vm import DL_CPU, load_vm, vm_function
from llmc.runtime.weights import stored_weights

DL_METAL = 8
ARGUMENTS = ("input_ids", "positions", "slot_mapping", "q_indptr", "seq_lens", "block_table", "logit_rows")


class MetalExecutor:
    """An :class:`~llmc.runtime.executor.Executor` over a module that llmc compiled for Apple GPUs."""

    pipeline = None
    device_name = "metal"
    device_type = DL_METAL

    def __init__(self, artifact: Artifact, num_pages: int) -> None:
        """Load the artifact's module, copy its weights to the device, and make ``num_pages`` zero pages.

        Raises ArtifactError if the module or the weights are damaged, MissingExtraError without TVM's runtime.
        """
        m = artifact.manifest
        self.num_pages, self._vocab, self._kv_dtype = num_pages, m.model.vocab_size, m.kv.dtype
        ffi = self.load_runtime(artifact)
        self._device, self._ffi = ffi.device(self.device_name, 0), ffi
        devices = [(self.device_type, 0)] + ([(DL_CPU, 0)] if self.device_type != DL_CPU else [])
        vm = load_vm(ffi, artifact.folder / artifact.variant.library, *devices)
        self._functions = {phase: vm_function(vm, phase) for phase in ("decode", "extend")}
        # an array of zeros is not in memory until it is read, which happens a layer at a time
        self._pages = [self._tensor(zeros(shape, m.kv.dtype), m.kv.dtype) for shape in page_shapes(m, num_pages)]
        weights = stored_weights(artifact.folder, m.tensors, artifact.variant.weights)
        self._static = (*self._pages, *(self._tensor(w.array, w.dtype) for w in weights))
        self._arguments: dict[tuple[str, tuple[int, ...]], Any] = {}

    def load_runtime(self, artifact: Artifact) -> Any:
        """tvm-ffi, with TVM's runtime for the device in the process."""
        return load_metal_runtime(artifact.folder, artifact.manifest.tvm)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._ffi.get_global_func(f"runtime.{name}")(*arguments)

    def _empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self._call("TVMTensorAllocWithScope", self._ffi.Shape(tuple(shape)), self._ffi.dtype(dtype), self._device, None)

    def _tensor(self, array: np.ndarray, dtype: str) -> Any:
        """A device tensor of ``dtype`` with the bits of ``array``."""
        tensor = self._empty(array.shape, dtype)
        self._fill(tensor, array)
        return tensor

    def _fill(self, tensor: Any, array: np.ndarray) -> None:
        held = np.ascontiguousarray(array)
        if held.nbytes:
            self._call("TVMTensorCopyFromBytes", tensor, _pointer(held), held.nbytes)

    def _argument(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        """The tensor for an argument of a shape; the same in every step."""
        key = (name, shape)
        if key not in self._arguments:
            self._arguments[key] = self._empty(shape, dtype)
        return self._arguments[key]

    def run(self, step: Step) -> np.ndarray:
        """See :meth:`Executor.run`."""
        rows = len(step.seq_lens if step.logit_rows is None else step.logit_rows)
        out = self._argument("out", (rows, self._vocab), "float32")
        arguments = [out]
        for name in ARGUMENTS:
            values = getattr(step, name)
            if values is not None:
                arguments.append(self._argument(name, values.shape, "int32"))
                self._fill(arguments[-1], values)
        logits = np.empty((rows, self._vocab), np.float32)
        try:
            self._functions["decode" if step.logit_rows is None else "extend"](*arguments, *self._static)
            self._call("TVMTensorCopyToBytes", out, _pointer(logits), logits.nbytes)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise InternalError(f"the compiled module failed ({''.join(reason)}): please report the model") from error
        return logits

    def copy_page(self, source: int, target: int) -> None:
        """See :meth:`Executor.copy_page`."""
        for pages in self._pages:
            self._call("TVMTensorCopyFromTo", self._page(pages, source), self._page(pages, target))

    def clear_page(self, page: int) -> None:
        """See :meth:`Executor.clear_page`."""
        for pages in self._pages:
            self._fill(self._page(pages, page), zeros((1, *pages.shape[1:]), self._kv_dtype))

    def _page(self, pages: Any, page: int) -> Any:
        """One of a layer's pages."""
        shape, dtype = (1, *pages.shape[1:]), self._ffi.dtype(self._kv_dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self._call("TVMTensorCreateView", pages, self._ffi.Shape(shape), dtype, nbytes * page)

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._functions, self._static, self._pages, self._arguments = {}, (), [], {}


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
