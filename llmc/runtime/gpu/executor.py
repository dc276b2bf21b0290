"""Run a compiled module on a device with memory of its own: :class:`GpuExecutor`, beside the CPU's in :mod:`llmc.runtime.executor`.

Weights, pages and step arguments have fixed addresses in device memory. A step copies one block of index arrays in, and its
logits out if the host wants them; on CUDA it mostly wants tokens only, chosen on the device (:mod:`llmc.runtime.gpu.pipeline`).
Between copies the host only starts kernels, and where the driver has graphs, after its first decode step of a batch size only one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any

import numpy as np

from llmc.errors import InternalError, RequestError
from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import Step
from llmc.runtime.executor import page_shapes
from llmc.runtime.footprint import aligned, argument_sizes, footprint
from llmc.runtime.gpu.cudart import DeviceTensors, Driver, Piece, device_bytes
from llmc.runtime.gpu.pipeline import CudaPipeline
from llmc.runtime.weights import stored_weights

_RESERVE = 256 << 20
"""Bytes of the GPU that are left alone: machine code, CUDA graphs, and what fragments."""

_COPY_BYTES, _COPIES = 1 << 30, 6


class _Arguments:
    """The step's index arrays: a pinned block on the host and one of the same layout on the device, copied at once.

    Every array has room for the largest step and starts at a fixed place; the block table, mostly the largest, comes last, so
    that what a step does not use of it is not copied. ``shapes``: of the arrays of the last step, by name.
    """

    def __init__(self, driver: Driver, m: Manifest) -> None:
        self.table_width = -(-m.model.context // m.kv.page_size)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._driver = driver
        self.offset: dict[str, int] = {}
        total = 0
        for name, size in argument_sizes(m).items():
            self.offset[name] = total
            total += aligned(4 * size)
        self._host = driver.pinned(total)
        self._host[:] = 0
        self._sent = driver.event()
        self.address = driver.allocate(total, zero=True)

    def put(self, step: Step, draws: np.ndarray | None = None, positions: np.ndarray | None = None) -> None:
        """Send the step's arrays, and its draws and their positions if tokens are chosen on the device. The block table is as wide
        as the longest sequence may get."""
        arrays = {name: getattr(step, name, None) for name in self.offset} | {"draws": draws, "draw_positions": positions}
        self.shapes = {}
        self._driver.wait(self._sent)  # what the pinned block holds may still be on its way
        for name, values in arrays.items():
            if values is None:
                continue
            shape = (len(values), self.table_width) if name == "block_table" else values.shape
            view = self._host[self.offset[name] :].view(np.int32)[: prod(shape)].reshape(shape)
            view[..., : values.shape[-1]] = values
            self.shapes[name] = shape
        end = self.offset["block_table"] + 4 * prod(self.shapes["block_table"])
        self._driver.copy_in(self.address, self._host[:end])
        self._driver.record(self._sent)

    def put_table(self, row: int, first: int, entries: np.ndarray) -> None:
        """Send new entries of the block table's row, from the ``first`` on; they are in pinned memory."""
        self._driver.copy_in(self.address + self.offset["block_table"] + 4 * (row * self.table_width + first), entries)


class GpuExecutor(ABC):
    """An :class:`~llmc.runtime.executor.Executor` over a module that llmc compiled for a GPU; subclasses say which driver it has.

    ``graphs``: whether decode steps run as graphs, recorded once for each batch size, where the driver has them. ``timer``: set it
    to measure steps.
    """

    pipeline: CudaPipeline | None = None

    @classmethod
    @abstractmethod
    def open_driver(cls, device: int) -> Driver:
        """The driver of GPU ``device``. Raises MissingExtraError without its library, ArtifactError if the GPU cannot be used."""

    @abstractmethod
    def load_module(self, artifact: Artifact) -> tuple[DeviceTensors, dict[str, Callable[..., Any]]]:
        """What makes tensors of the device's memory, and the functions of the artifact's module. Raises ArtifactError if it is
        damaged or not for this device, MissingExtraError without TVM's runtime."""

    def calling(self) -> AbstractContextManager[Any]:
        """What surrounds every call of a function."""
        return nullcontext()

    @classmethod
    def available_memory(cls, artifact: Artifact, device: int = 0) -> int:
        """Bytes of the GPU's memory that are left for KV pages once the artifact is on it; none or less if it does not fit."""
        driver = cls.open_driver(device)
        free, _ = driver.memory()
        driver.close()
        return free - footprint(artifact.manifest, artifact.variant).total - _RESERVE

    def __init__(self, artifact: Artifact, num_pages: int, device: int = 0, graphs: bool = True) -> None:
        """Load the artifact's module on GPU ``device``, send its weights there, and make ``num_pages`` zero pages.

        Raises ArtifactError if the module or the weights are damaged or the GPU cannot be used, RequestError if they do not
        fit its memory.
        """
        m = artifact.manifest
        self.num_pages, self.page_size = num_pages, m.kv.page_size
        self._vocab, self._kv_dtype = m.model.vocab_size, m.kv.page_dtype
        self.driver = self.open_driver(device)
        self._tensors, self._functions = self.load_module(artifact)
        shapes = page_shapes(m, num_pages)
        self._rows = max(m.limits.max_logit_rows, m.limits.max_batch)
        try:
            self._pages = [(self.driver.allocate(device_bytes(s, m.kv.page_dtype), zero=True), s) for s in shapes]
            weights = self._upload(artifact)
            self._out = self.driver.allocate(4 * self._rows * self._vocab)
            self._arguments = _Arguments(self.driver, m)
            self._logits = self.driver.pinned(4 * self._rows * self._vocab).view(np.float32)
            self.pipeline = self.make_pipeline(m)
        except InternalError as error:
            needed = sum(device_bytes(s, m.kv.page_dtype) for s in shapes)
            self.driver.close()
            raise RequestError(
                f"the model does not fit the GPU ({error}): its KV cache asks for {needed} bytes beside the weights: load it "
                "with a smaller kv_memory, context or max_batch"
            ) from error
        self._static = (*(self._tensors.tensor(a, s, m.kv.page_dtype) for a, s in self._pages), *weights)
        self._views: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._recorded: dict[tuple[str, int], Callable[[], None]] = {}
        self._warm: set[tuple[str, int]] = set()
        self.graphs = graphs and self.driver.graphs
        self.timer: StepTimer | None = None

    def make_pipeline(self, m: Manifest) -> CudaPipeline | None:
        """What chooses tokens on the device, if the module can. Raises InternalError if the device has no room for it."""
        return None

    def _upload(self, artifact: Artifact) -> list[Any]:
        """The weights as device tensors."""
        weights = stored_weights(artifact.folder, artifact.manifest.tensors, artifact.variant.weights)
        addresses = self.driver.allocate_all([aligned(w.array.nbytes) for w in weights])
        tensors, pieces = [], []
        for weight, address in zip(weights, addresses, strict=True):
            tensors.append(self._tensors.tensor(address, weight.array.shape, weight.dtype))
            pieces.append(Piece(address, weight.path, weight.offset, weight.array.nbytes))
        self.driver.upload(pieces)
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
        if self.pipeline is not None:
            self.pipeline.current = None
        rows = len(step.seq_lens if step.logit_rows is None else step.logit_rows)
        found = self._logits[: rows * self._vocab]
        with self.driver.turn():
            self.put(step)
            with self._timed():
                if step.logit_rows is None:
                    self._replay("decode", rows, lambda: self._forward("decode", rows))
                else:
                    self._forward("extend", rows)
            self.driver.copy_out(found, self._out)
        self.driver.synchronize()
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
        assert self.pipeline is not None
        counts = self._view(self.pipeline.counts, (self.pipeline.max_draws, self._vocab), "int16")
        self._call("sample", [self._chosen(draws), logits, self._argument("draws"), self._argument(positions), counts])

    def _chosen(self, draws: int) -> Any:
        assert self.pipeline is not None
        return self._view(self.pipeline.tokens, (draws,), "int32")

    def _call(self, function: str, arguments: Sequence[Any]) -> None:
        try:
            with self.calling():
                self._functions[function](*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise InternalError(f"the compiled module failed ({''.join(reason)}): please report the model") from error

    def _replay(self, what: str, batch: int, work: Callable[[], None]) -> None:
        """The first time for a batch size ``work`` runs as it is and allocates its workspace; the second time it is recorded, and
        then replayed."""
        key = (what, batch)
        if self.graphs and key in self._warm and key not in self._recorded:
            self._recorded[key] = self.driver.capture(work)
        if key in self._recorded:
            self._recorded[key]()
            return
        work()
        self._warm.add(key)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.timer is None else self.timer.step()

    def start_timer(self) -> StepTimer:
        """Measure the device's time on every step from now on."""
        self.timer = StepTimer(self.driver)
        return self.timer

    def bandwidth(self) -> float:
        """Bytes per second that the device reads and writes when it copies: the best of a few copies larger than its caches."""
        self.driver.use()
        size = min(_COPY_BYTES, self.driver.memory()[0] // 4)
        source, target = (self.driver.allocate(size) for _ in range(2))
        timer, best = StepTimer(self.driver), float("inf")
        for _ in range(_COPIES):
            with timer.step():
                self.driver.copy(target, source, size)
            best = min(best, timer.seconds())
        for address in (source, target):
            self.driver.free(address)
        return 2 * size / best

    def copy_page(self, source: int, target: int) -> None:
        """See :meth:`Executor.copy_page`."""
        for address, shape in self._pages:
            nbytes = device_bytes(shape[1:], self._kv_dtype)
            self.driver.copy(address + target * nbytes, address + source * nbytes, nbytes)

    def clear_page(self, page: int) -> None:
        """See :meth:`Executor.clear_page`."""
        for address, shape in self._pages:
            nbytes = device_bytes(shape[1:], self._kv_dtype)
            self.driver.clear(address + page * nbytes, nbytes)

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._recorded, self._views, self._static = {}, {}, ()
        self._functions = {}
        self._pages = []
        self.driver.close()


class StepTimer:
    """Measures how long the device works on steps, by its own clock: events before and behind each one."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._passed: list[tuple[int, int]] = []
        self._free: list[tuple[int, int]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is put into the stream meanwhile is one step."""
        start, end = self._free.pop() if self._free else (self._driver.event(timing=True), self._driver.event(timing=True))
        self._driver.record(start)
        yield
        self._driver.record(end)
        self._passed.append((start, end))

    def seconds(self) -> float:
        """The device's time on the steps since the last call, once they are done."""
        self._driver.use()
        self._driver.synchronize()
        total = sum(self._driver.elapsed(start, end) for start, end in self._passed)
        self._free += self._passed
        self._passed = []
        return total
