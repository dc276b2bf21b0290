"""Run a compiled module on an NVIDIA GPU: :class:`CudaExecutor`, beside the CPU's in :mod:`llmc.runtime.executor`.

Weights, pages and step arguments have fixed addresses in device memory. A step copies one block of index arrays in, and its
logits out if the host wants them; mostly it wants tokens only, chosen on the device (:mod:`llmc.runtime.pipeline`). Between
copies the host only starts kernels, and after its first decode step of a batch size only one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any

import numpy as np

from llmc.errors import InternalError, RequestError
from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import Step
from llmc.runtime.cudart import DL_CUDA, Cuda, DeviceTensors, Piece, device_bytes
from llmc.runtime.executor import page_shapes
from llmc.runtime.footprint import aligned, argument_sizes, footprint
from llmc.runtime.library import load_cuda_runtime
from llmc.runtime.pipeline import CudaPipeline
from llmc.runtime.vm import DL_CPU, load_vm, vm_function
from llmc.runtime.weights import stored_weights

_RESERVE = 256 << 20
"""Bytes of the GPU that are left alone: machine code, CUDA graphs, and what fragments."""

_COPY_BYTES, _COPIES = 1 << 30, 6

FUNCTIONS = ("decode", "extend", "sample", "advance")


def available_memory(artifact: Artifact, device: int = 0) -> int:
    """Bytes of the GPU's memory that are left for KV pages once the artifact is on it; none or less if it does not fit."""
    cuda = Cuda(device)
    free, _ = cuda.memory()
    cuda.close()
    return free - footprint(artifact.manifest, artifact.variant).total - _RESERVE


class _Arguments:
    """The step's index arrays: a pinned block on the host and one of the same layout on the device, copied at once.

    Every array has room for the largest step and starts at a fixed place; the block table, mostly the largest, comes last, so
    that what a step does not use of it is not copied. ``shapes``: of the arrays of the last step, by name.
    """

    def __init__(self, cuda: Cuda, m: Manifest) -> None:
        self.table_width = -(-m.model.context // m.kv.page_size)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._cuda = cuda
        self.offset: dict[str, int] = {}
        total = 0
        for name, size in argument_sizes(m).items():
            self.offset[name] = total
            total += aligned(4 * size)
        self._host = cuda.pinned(total)
        self._host[:] = 0
        self._sent = cuda.event()
        self.address = cuda.allocate(total, zero=True)

    def put(self, step: Step, draws: np.ndarray | None = None, positions: np.ndarray | None = None) -> None:
        """Send the step's arrays, and its draws and their positions if tokens are chosen on the device. The block table is as wide
        as the longest sequence may get."""
        arrays = {name: getattr(step, name, None) for name in self.offset} | {"draws": draws, "draw_positions": positions}
        self.shapes = {}
        self._cuda.wait(self._sent)  # what the pinned block holds may still be on its way
        for name, values in arrays.items():
            if values is None:
                continue
            shape = (len(values), self.table_width) if name == "block_table" else values.shape
            view = self._host[self.offset[name] :].view(np.int32)[: prod(shape)].reshape(shape)
            view[..., : values.shape[-1]] = values
            self.shapes[name] = shape
        end = self.offset["block_table"] + 4 * prod(self.shapes["block_table"])
        self._cuda.copy_in(self.address, self._host[:end])
        self._cuda.record(self._sent)

    def put_table(self, row: int, first: int, entries: np.ndarray) -> None:
        """Send new entries of the block table's row, from the ``first`` on; they are in pinned memory."""
        self._cuda.copy_in(self.address + self.offset["block_table"] + 4 * (row * self.table_width + first), entries)


class CudaExecutor:
    """An :class:`~llmc.runtime.executor.Executor` over a module that llmc compiled for CUDA.

    ``graphs``: whether decode steps run as CUDA graphs, recorded once for each batch size. ``timer``: set it to measure steps.
    """

    def __init__(self, artifact: Artifact, num_pages: int, device: int = 0, graphs: bool = True) -> None:
        """Load the artifact's module on GPU ``device``, send its weights there, and make ``num_pages`` zero pages.

        Raises ArtifactError if the module or the weights are damaged or the GPU cannot be used, RequestError if they do not
        fit its memory.
        """
        m, variant = artifact.manifest, artifact.variant
        self.num_pages, self.page_size = num_pages, m.kv.page_size
        self._vocab, self._kv_dtype = m.model.vocab_size, m.kv.dtype
        self.cuda = Cuda(device)
        self._ffi = load_cuda_runtime(artifact.folder)
        self._stream = self._ffi.use_raw_stream(self._ffi.device("cuda", device), self.cuda.stream)
        self._tensors = DeviceTensors(self._ffi, device)
        self._vm = load_vm(self._ffi, artifact.folder / variant.library, (DL_CUDA, device), (DL_CPU, 0))
        self._functions = {name: vm_function(self._vm, name) for name in FUNCTIONS}
        shapes = page_shapes(m, num_pages)
        self._rows = max(m.limits.max_logit_rows, m.limits.max_batch)
        try:
            self._pages = [(self.cuda.allocate(device_bytes(s, m.kv.dtype), zero=True), s) for s in shapes]
            weights = self._upload(artifact)
            self._out = self.cuda.allocate(4 * self._rows * self._vocab)
            self._arguments = _Arguments(self.cuda, m)
            self._logits = self.cuda.pinned(4 * self._rows * self._vocab).view(np.float32)
            self.pipeline = CudaPipeline(self, m.limits.max_batch, self._vocab)
        except InternalError as error:
            needed = sum(device_bytes(s, m.kv.dtype) for s in shapes)
            self.cuda.close()
            raise RequestError(
                f"the model does not fit the GPU ({error}): its KV cache asks for {needed} bytes beside the weights: load it "
                "with a smaller kv_memory, context or max_batch"
            ) from error
        self._static = (*(self._tensors.tensor(a, s, m.kv.dtype) for a, s in self._pages), *weights)
        self._views: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._recorded: dict[tuple[str, int], Callable[[], None]] = {}
        self._warm: set[tuple[str, int]] = set()
        self.graphs = graphs
        self.timer: StepTimer | None = None

    def _upload(self, artifact: Artifact) -> list[Any]:
        """The weights as device tensors, in one allocation."""
        weights = stored_weights(artifact.folder, artifact.manifest.tensors, artifact.variant.weights)
        address = self.cuda.allocate(sum(aligned(w.array.nbytes) for w in weights))
        tensors, pieces = [], []
        for weight in weights:
            tensors.append(self._tensors.tensor(address, weight.array.shape, weight.dtype))
            pieces.append(Piece(address, weight.path, weight.offset, weight.array.nbytes))
            address += aligned(weight.array.nbytes)
        self.cuda.upload(pieces)
        return tensors

    def _view(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor over step memory; made once for each place and shape."""
        key = (address, shape, dtype)
        if key not in self._views:
            self._views[key] = self._tensors.tensor(address, shape, dtype)
        return self._views[key]

    def _argument(self, name: str) -> Any:
        """An array of the step as a tensor."""
        return self._view(self._arguments.address + self._arguments.offset[name], self._arguments.shapes[name], "int32")

    def run(self, step: Step) -> np.ndarray:
        """See :meth:`Executor.run`."""
        self.cuda.use()
        self.pipeline.current = None
        self.put(step)
        rows = len(step.seq_lens if step.logit_rows is None else step.logit_rows)
        found = self._logits[: rows * self._vocab]
        with self._timed():
            if step.logit_rows is None:
                self._replay("decode", rows, lambda: self._forward("decode", rows))
            else:
                self._forward("extend", rows)
        self.cuda.copy_out(found, self._out)
        self.cuda.synchronize()
        return found.reshape(rows, self._vocab)

    def put(self, step: Step, draws: np.ndarray | None = None, positions: np.ndarray | None = None) -> None:
        """Send the arrays of a step, for one of the calls below."""
        self._arguments.put(step, draws, positions)

    def put_table(self, row: int, first: int, entries: np.ndarray) -> None:
        """Send new entries of a row of the block table, from the ``first`` on, out of pinned memory."""
        self._arguments.put_table(row, first, entries)

    def step_on_device(self, batch: int) -> None:
        """Start a decode step with its choice of tokens, which leaves the arrays of the next one. Nothing is waited for."""

        def work() -> None:
            self._forward("decode", batch)
            self._sample(batch, "seq_lens")
            state = [self._argument(n) for n in ("slot_mapping", "input_ids", "positions", "seq_lens", "block_table")]
            self._call("advance", [state[0], self._chosen(batch), *state[1:]])

        with self._timed():
            self._replay("step", batch, work)

    def extend_on_device(self, draws: int) -> None:
        """Start an extend step and, if there are ``draws``, the choice of tokens. Nothing is waited for."""
        with self._timed():
            self._forward("extend", self._arguments.shapes["logit_rows"][0])
            if draws:
                self._sample(draws, "draw_positions")

    def _forward(self, phase: str, rows: int) -> None:
        names = ["input_ids", "positions", "slot_mapping", "q_indptr", "seq_lens", "block_table"]
        names += ["logit_rows"] if phase == "extend" else []
        out = self._view(self._out, (rows, self._vocab), "float32")
        self._call(phase, [out, *(self._argument(n) for n in names), *self._static])

    def _sample(self, draws: int, positions: str) -> None:
        rows = self._arguments.shapes["logit_rows" if positions == "draw_positions" else "seq_lens"][0]
        logits = self._view(self._out, (rows, self._vocab), "float32")
        counts = self._view(self.pipeline.counts, (self.pipeline.max_draws, self._vocab), "int16")
        self._call("sample", [self._chosen(draws), logits, self._argument("draws"), self._argument(positions), counts])

    def _chosen(self, draws: int) -> Any:
        return self._view(self.pipeline.tokens, (draws,), "int32")

    def _call(self, function: str, arguments: Sequence[Any]) -> None:
        try:
            with self._stream:
                self._functions[function](*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise InternalError(f"the compiled module failed ({''.join(reason)}): please report the model") from error

    def _replay(self, what: str, batch: int, work: Callable[[], None]) -> None:
        """The first time for a batch size ``work`` runs as it is and allocates its workspace; the second time it is recorded, and
        then replayed."""
        key = (what, batch)
        if self.graphs and key in self._warm and key not in self._recorded:
            self._recorded[key] = self.cuda.capture(work)
        if key in self._recorded:
            self._recorded[key]()
            return
        work()
        self._warm.add(key)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.timer is None else self.timer.step()

    def start_timer(self) -> StepTimer:
        """Measure the device's time on every step from now on."""
        self.timer = StepTimer(self.cuda)
        return self.timer

    def bandwidth(self) -> float:
        """Bytes per second that the device reads and writes when it copies: the best of a few copies larger than its caches."""
        self.cuda.use()
        size = min(_COPY_BYTES, self.cuda.memory()[0] // 4)
        source, target = (self.cuda.allocate(size) for _ in range(2))
        timer, best = StepTimer(self.cuda), float("inf")
        for _ in range(_COPIES):
            with timer.step():
                self.cuda.copy(target, source, size)
            best = min(best, timer.seconds())
        for address in (source, target):
            self.cuda.free(address)
        return 2 * size / best

    def copy_page(self, source: int, target: int) -> None:
        """See :meth:`Executor.copy_page`."""
        for address, shape in self._pages:
            nbytes = device_bytes(shape[1:], self._kv_dtype)
            self.cuda.copy(address + target * nbytes, address + source * nbytes, nbytes)

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._recorded, self._views, self._static = {}, {}, ()
        self._functions, self._vm = {}, None
        self._pages = []
        self.cuda.close()


class StepTimer:
    """Measures how long the device works on steps, by its own clock: events before and behind each one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._passed: list[tuple[int, int]] = []
        self._free: list[tuple[int, int]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is put into the stream meanwhile is one step."""
        start, end = self._free.pop() if self._free else (self._cuda.event(timing=True), self._cuda.event(timing=True))
        self._cuda.record(start)
        yield
        self._cuda.record(end)
        self._passed.append((start, end))

    def seconds(self) -> float:
        """The device's time on the steps since the last call, once they are done."""
        self._cuda.use()
        self._cuda.synchronize()
        total = sum(self._cuda.elapsed(start, end) for start, end in self._passed)
        self._free += self._passed
        self._passed = []
        return total
