"""Run a compiled module: the one place where the runtime calls native code.

What a step needs beyond its few index arrays (KV pages, weights, hundreds of tensors) is wrapped once, at load: a step
costs the same Python whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from llmc.errors import InternalError, RequestError
from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import Step
from llmc.runtime.host import default_threads, host
from llmc.runtime.library import load_runtime
from llmc.runtime.sampling import Sampler
from llmc.runtime.tensors import tensor, zeros
from llmc.runtime.threads import use_threads
from llmc.runtime.vm import DL_CPU, load_vm, vm_function
from llmc.runtime.weights import map_weights


class Executor(Protocol):
    """A model with its KV pages, behind the two phases of the module ABI. Not safe to call from two threads at once."""

    @property
    def num_pages(self) -> int:
        """Pages of KV cache, numbered from 0, each ``manifest.kv.page_size`` positions over all layers."""

    def run(self, step: Step) -> np.ndarray:
        """Append the step's rows to the KV pages; logits float32 [r, vocab] of the rows it wants, in order.

        The array is valid until the next call.
        """

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page over all layers."""

    def clear_page(self, page: int) -> None:
        """Fill one page with zeros over all layers. Kernels multiply what is behind a sequence's end in its last page by zero, and
        what a sequence with numbers that are not finite has left there would get into another's."""

    @property
    def pipeline(self) -> Pipeline | None:
        """What chooses tokens on the device and runs ahead of the host; None where the host samples from :meth:`run`."""

    def close(self) -> None:
        """Let go of module, weights and pages."""


class Draw(NamedTuple):
    """A token to choose: how, and from which row of the step's logits."""

    sampler: Sampler
    row: int


class Pipeline(Protocol):
    """Steps that the host starts without waiting for the tokens of those before."""

    depth: int
    """Steps that are worth having in flight."""

    max_draws: int
    """Tokens that one step may choose."""

    def begin(self, step: Step, draws: Sequence[Draw]) -> Flight:
        """Start ``step`` and choose tokens from its logits. A decode step has one draw for each row, in order; an extend step any
        number up to ``max_draws``, several of a row or none among them.
        """


class Flight(Protocol):
    """A step that was started, and those that follow from it. Tokens come in the order of the draws."""

    @property
    def in_flight(self) -> int:
        """Steps whose tokens have not been collected."""

    def again(self, tables: Sequence[Sequence[int]]) -> bool:
        """Start one more decode step, whose inputs are the tokens of the last one; ``tables``: the pages of each sequence now.

        False if the step's arrays have been used for something else since: collect what is in flight and begin anew.
        """

    def collect(self) -> list[int]:
        """The tokens of the oldest step in flight, once it is done; -1 where the logits were not finite."""

    def abandon(self) -> None:
        """Nobody will collect what is in flight."""


def page_shapes(m: Manifest, num_pages: int) -> list[tuple[int, int, int]]:
    """The shape of every layer's page tensor, of dtype ``m.kv.page_dtype``: [num_pages, heads, elements of a page]."""
    return [(num_pages, layer.heads, m.kv.layout(layer).width) for layer in m.kv.layers]


class _Buffer:
    """An aligned array that step arguments are copied into, large enough for any step: its address never changes. The tensor over
    it is kept as long as its shape stays, as it does from one decode step to the next."""

    def __init__(self, count: int, dtype: str) -> None:
        self._dtype = dtype
        self._flat = zeros((count,), dtype)
        self._latest = self.view((0,))
        self._tensor = tensor(self._latest, dtype)

    def view(self, shape: tuple[int, ...]) -> np.ndarray:
        """The start of the buffer in ``shape``."""
        return self._flat[: prod(shape)].reshape(shape)

    def shaped(self, shape: tuple[int, ...]) -> tuple[np.ndarray, Any]:
        """The start of the buffer in ``shape``, as an array and as a tensor."""
        if self._latest.shape != shape:
            self._latest = self.view(shape)
            self._tensor = tensor(self._latest, self._dtype)
        return self._latest, self._tensor

    def fill(self, values: np.ndarray) -> Any:
        """The start of the buffer, holding ``values``, as a tensor."""
        array, filled = self.shaped(values.shape)
        array[...] = values
        return filled


class TvmExecutor:
    """An :class:`Executor` over a module that llmc compiled for the CPU. Host and device are one: none can run ahead."""

    pipeline = None

    def __init__(self, artifact: Artifact, num_pages: int, threads: int | None = None) -> None:
        """Load the artifact's module, map its weights, and make ``num_pages`` zero pages (a stale NaN would leak through a
        masked product). ``threads`` defaults to one for each physical core.

        Raises ArtifactError if the module or the weights are damaged, RequestError for an impossible number of threads.
        """
        m, variant = artifact.manifest, artifact.variant
        count = default_threads() if threads is None else threads
        if not 1 <= count <= len(host().cpus):
            raise RequestError(f"threads={count} cannot be: this process may use 1 to {len(host().cpus)} processors")
        ffi = load_runtime(artifact.folder, artifact.manifest.tvm)
        self._ffi = ffi
        self.num_pages = num_pages
        self.threads = count
        self._vocab = m.model.vocab_size
        self._vm = load_vm(ffi, artifact.folder / variant.library, (DL_CPU, 0))
        self._decode = vm_function(self._vm, "decode")
        self._extend = vm_function(self._vm, "extend")
        # pages and weights as arrays, too: copy_page works on them, and they keep the memory
        self._pages = [zeros(shape, m.kv.page_dtype) for shape in page_shapes(m, num_pages)]
        weights = map_weights(artifact.folder, m.tensors, variant.weights)
        self._static = (
            *(tensor(pages, m.kv.page_dtype) for pages in self._pages),
            *(tensor(array, dtype) for array, dtype in weights),
        )
        limits = m.limits
        rows = max(limits.max_rows, limits.max_batch)
        sizes = {
            "input_ids": rows,
            "positions": rows,
            "slot_mapping": rows,
            "q_indptr": limits.max_batch + 1,
            "seq_lens": limits.max_batch,
            "block_table": limits.max_batch * -(-m.model.context // m.kv.page_size),
            "logit_rows": max(limits.max_logit_rows, 1),
        }
        self._buffers = {name: _Buffer(size, "int32") for name, size in sizes.items()}
        self._out = _Buffer(max(limits.max_logit_rows, limits.max_batch) * self._vocab, "float32")

    def run(self, step: Step) -> np.ndarray:
        """See :meth:`Executor.run`."""
        rows = step.seq_lens if step.logit_rows is None else step.logit_rows
        out, logits = self._out.shaped((len(rows), self._vocab))
        buffers = self._buffers
        arguments = [
            logits,
            buffers["input_ids"].fill(step.input_ids),
            buffers["positions"].fill(step.positions),
            buffers["slot_mapping"].fill(step.slot_mapping),
            buffers["q_indptr"].fill(step.q_indptr),
            buffers["seq_lens"].fill(step.seq_lens),
            buffers["block_table"].fill(step.block_table),
        ]
        function = self._decode
        if step.logit_rows is not None:
            function = self._extend
            arguments.append(buffers["logit_rows"].fill(step.logit_rows))
        use_threads(self._ffi, self.threads)
        try:
            function(*arguments, *self._static)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise InternalError(f"the compiled module failed ({''.join(reason)}): please report the model") from error
        return out

    def copy_page(self, source: int, target: int) -> None:
        """See :meth:`Executor.copy_page`."""
        for pages in self._pages:
            pages[target] = pages[source]

    def clear_page(self, page: int) -> None:
        """See :meth:`Executor.clear_page`."""
        for pages in self._pages:
            pages[page] = 0

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        self._decode = self._extend = self._vm = None
        self._static = ()
        self._pages = []
