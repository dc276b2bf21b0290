"""Run a compiled module on an NVIDIA GPU: :class:`CudaExecutor`, beside the CPU's in :mod:`llmc.runtime.executor`.

Weights, pages and step arguments have fixed addresses in device memory. A step copies one block of index arrays in and its
logits out; between them the host only starts kernels, and after its first decode step of a batch size only one graph.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from llmc.errors import InternalError, RequestError
from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import Step
from llmc.runtime.cudart import DL_CUDA, Cuda, DeviceTensors, device_bytes
from llmc.runtime.executor import page_shapes
from llmc.runtime.library import load_cuda_runtime
from llmc.runtime.vm import DL_CPU, load_vm, vm_function
from llmc.runtime.weights import map_weights

_ALIGNMENT = 256
"""Bytes between the starts of tensors: what cudaMalloc itself aligns to, and TMA asks for half of."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def available_memory(artifact: Artifact, device: int = 0) -> int:
    """Bytes of the GPU's memory that are left for KV pages once the artifact's weights and workspace are on it."""
    cuda = Cuda(device)
    free, _ = cuda.memory()
    cuda.close()
    m, variant = artifact.manifest, artifact.variant
    weights = sum(_aligned(device_bytes(m.tensors[name].shape, m.tensors[name].dtype)) for name in variant.weights)
    logits = max(m.limits.max_logit_rows, m.limits.max_batch) * m.model.vocab_size * 4
    return max(0, free - weights - logits - max(f.workspace_bytes for f in variant.functions))


class _Arguments:
    """The step's index arrays: a pinned block on the host and one of the same layout on the device, copied at once.

    Every array has room for the largest step and starts at a fixed place; the block table, mostly the largest, comes last, so
    that what a step does not use of it is not copied.
    """

    def __init__(self, cuda: Cuda, m: Manifest) -> None:
        limits = m.limits
        rows = max(limits.max_rows, limits.max_batch)
        self.table_width = -(-m.model.context // m.kv.page_size)
        sizes = {
            "input_ids": rows,
            "positions": rows,
            "slot_mapping": rows,
            "q_indptr": limits.max_batch + 1,
            "seq_lens": limits.max_batch,
            "logit_rows": max(limits.max_logit_rows, 1),
            "block_table": limits.max_batch * self.table_width,
        }
        self._cuda = cuda
        self.offset: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            self.offset[name] = total
            total += _aligned(4 * size)
        self._host = cuda.pinned(total)
        self._host[:] = 0
        self.address = cuda.allocate(total, zero=True)

    def put(self, step: Step) -> dict[str, tuple[int, ...]]:
        """Send the step's arrays; their shapes by name. The block table is as wide as the longest sequence may get."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.offset:
            values = getattr(step, name)
            if values is None:
                continue
            shape = (len(values), self.table_width) if name == "block_table" else values.shape
            view = self._host[self.offset[name] :].view(np.int32)[: prod(shape)].reshape(shape)
            view[..., : values.shape[-1]] = values
            shapes[name] = shape
        end = self.offset["block_table"] + 4 * prod(shapes["block_table"])
        self._cuda.copy_in(self.address, self._host[:end])
        return shapes


class CudaExecutor:
    """An :class:`~llmc.runtime.executor.Executor` over a module that llmc compiled for CUDA.

    ``graphs``: whether decode steps run as CUDA graphs, recorded once for each batch size.
    """

    def __init__(self, artifact: Artifact, num_pages: int, device: int = 0, graphs: bool = True) -> None:
        """Load the artifact's module on GPU ``device``, send its weights there, and make ``num_pages`` zero pages.

        Raises ArtifactError if the module or the weights are damaged or the GPU cannot be used, RequestError if they do not
        fit its memory.
        """
        m, variant = artifact.manifest, artifact.variant
        self.num_pages = num_pages
        self._vocab, self._kv_dtype = m.model.vocab_size, m.kv.dtype
        self._cuda = Cuda(device)
        self._ffi = load_cuda_runtime(artifact.folder)
        self._stream = self._ffi.use_raw_stream(self._ffi.device("cuda", device), self._cuda.stream)
        self._tensors = DeviceTensors(self._ffi, device)
        self._vm = load_vm(self._ffi, artifact.folder / variant.library, (DL_CUDA, device), (DL_CPU, 0))
        self._functions = {name: vm_function(self._vm, name) for name in ("decode", "extend")}
        shapes = page_shapes(m, num_pages)
        self._rows = max(m.limits.max_logit_rows, m.limits.max_batch)
        try:
            self._pages = [(self._cuda.allocate(device_bytes(s, m.kv.dtype), zero=True), s) for s in shapes]
            weights = self._upload(artifact)
            self._out = self._cuda.allocate(4 * self._rows * self._vocab)
            self._arguments = _Arguments(self._cuda, m)
            self._logits = self._cuda.pinned(4 * self._rows * self._vocab).view(np.float32)
        except InternalError as error:
            needed = sum(device_bytes(s, m.kv.dtype) for s in shapes)
            self._cuda.close()
            raise RequestError(
                f"the model does not fit the GPU ({error}): its KV cache asks for {needed} bytes beside the weights: load it "
                "with a smaller kv_memory, context or max_batch"
            ) from error
        self._static = (*(self._tensors.tensor(a, s, m.kv.dtype) for a, s in self._pages), *weights)
        self._views: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._recorded: dict[int, Any] = {}
        self._warm: set[int] = set()
        self.graphs = graphs

    def _upload(self, artifact: Artifact) -> list[Any]:
        """The weights as device tensors, in one allocation."""
        arrays = map_weights(artifact.folder, artifact.manifest.tensors, artifact.variant.weights)
        address = self._cuda.allocate(sum(_aligned(array.nbytes) for array, _ in arrays))
        tensors, pieces = [], []
        for array, dtype in arrays:
            tensors.append(self._tensors.tensor(address, array.shape, dtype))
            pieces.append((address, array))
            address += _aligned(array.nbytes)
        self._cuda.upload(pieces)
        return tensors

    def _view(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor over step memory; made once for each place and shape."""
        key = (address, shape, dtype)
        if key not in self._views:
            self._views[key] = self._tensors.tensor(address, shape, dtype)
        return self._views[key]

    def run(self, step: Step) -> np.ndarray:
        """See :meth:`Executor.run`."""
        self._cuda.use()
        shapes = self._arguments.put(step)
        rows = len(step.seq_lens if step.logit_rows is None else step.logit_rows)
        names = ["input_ids", "positions", "slot_mapping", "q_indptr", "seq_lens", "block_table"]
        names += [] if step.logit_rows is None else ["logit_rows"]
        arguments = [self._view(self._out, (rows, self._vocab), "float32")]
        arguments += [self._view(self._arguments.address + self._arguments.offset[n], shapes[n], "int32") for n in names]
        try:
            if step.logit_rows is None:
                self._decode(rows, arguments)
            else:
                self._call("extend", arguments)
            found = self._logits[: rows * self._vocab]
            self._cuda.copy_out(found, self._out)
            self._cuda.synchronize()
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise InternalError(f"the compiled module failed ({''.join(reason)}): please report the model") from error
        return found.reshape(rows, self._vocab)

    def _call(self, phase: str, arguments: list[Any]) -> None:
        with self._stream:
            self._functions[phase](*arguments, *self._static)

    def _decode(self, batch: int, arguments: list[Any]) -> None:
        """The first step of a batch size runs as it is and allocates its workspace; the second is recorded, and then replayed."""
        if self.graphs and batch in self._warm and batch not in self._recorded:
            self._recorded[batch] = self._cuda.capture(lambda: self._call("decode", arguments))
        if batch in self._recorded:
            self._recorded[batch]()
            return
        self._call("decode", arguments)
        self._warm.add(batch)

    def copy_page(self, source: int, target: int) -> None:
        """See :meth:`Executor.copy_page`."""
        for address, shape in self._pages:
            nbytes = device_bytes(shape[1:], self._kv_dtype)
            self._cuda.copy(address + target * nbytes, address + source * nbytes, nbytes)

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._recorded, self._views, self._static = {}, {}, ()
        self._functions, self._vm = {}, None
        self._pages = []
        self._cuda.close()
