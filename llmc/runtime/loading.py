"""``llmc.load``: from an artifact's folder to a running model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import RequestError
from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact, open_artifact
from llmc.runtime.executor import Executor, TvmExecutor
from llmc.runtime.host import memory
from llmc.runtime.model import Model, bounded

if TYPE_CHECKING:
    from llmc.runtime.gpu.executor import GpuExecutor

_MEMORY_SHARE = 0.5
"""The most of the memory now available that the KV cache takes unless told otherwise, on a machine that does other things too."""

_EXECUTORS = {"cuda": ("cuda", "CudaExecutor"), "rocm": ("hip", "HipExecutor"), "opencl": ("opencl", "OpenClExecutor")}

_log = logging.getLogger("llmc")


@dataclass(frozen=True)
class Memory:
    """The memory that KV pages may come from: bytes free now, and whether it is there for nothing else (a GPU's)."""

    available: int
    exclusive: bool = False


def kv_page_count(m: Manifest, context: int, max_batch: int, kv_memory: int | None, free: Memory) -> int:
    """Pages of KV cache for ``max_batch`` sequences of ``context`` tokens, as far as the memory goes (all in bytes).

    ``kv_memory`` bounds it if given; otherwise memory that is exclusive does, or else two full contexts and half of what is
    available, whichever is less. Raises RequestError if ``kv_memory``, or exclusive memory, does not hold a page.
    """
    size = m.kv.page_size
    per_page = max(m.kv.page_bytes, 1)
    per_sequence = -(-context // size)
    wanted = per_sequence * max_batch
    if kv_memory is not None:
        if kv_memory < per_page:
            raise RequestError(
                f"kv_memory={kv_memory} bytes holds no page of {size} tokens ({per_page} bytes): "
                f"a full context of {context} tokens takes {per_sequence * per_page} bytes"
            )
        return min(wanted, kv_memory // per_page)
    if not free.exclusive:
        return max(1, min(wanted, 2 * per_sequence, int(free.available * _MEMORY_SHARE) // per_page))
    if free.available < per_page:
        raise RequestError(
            f"the GPU lacks {per_page - free.available} bytes for this model and one page of its KV cache: free some of its memory "
            "(nvidia-smi or rocm-smi says who holds it), or use a larger GPU, or recompile with a smaller max_batch"
        )
    return min(wanted, free.available // per_page)


def fitted(m: Manifest, pages: int, context: int | None, max_batch: int | None) -> tuple[int, int]:
    """Context and batch. Where they were not asked for (None), they are the artifact's, or less if ``pages`` hold no more of them,
    which is said. Raises RequestError for what the artifact was not compiled for."""
    length = bounded("context", context, m.model.context)
    batch = bounded("max_batch", max_batch, m.limits.max_batch)
    if context is None and pages * m.kv.page_size < length:
        length = pages * m.kv.page_size
        _log.warning(
            "the free memory holds a context of %d tokens, not the %d of the artifact: free some, or give kv_memory",
            length,
            m.model.context,
        )
    if max_batch is None and pages < batch:
        batch = pages
        _log.warning("the free memory holds %d sequences at once, not %d: free some, or give kv_memory", batch, m.limits.max_batch)
    return length, batch


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    max_batch: int | None = None,
    kv_memory: int | None = None,
) -> Model:
    """Load the artifact in the folder ``path``.

    ``threads``: default one for each physical core. ``context``: the most tokens of a sequence, ``max_batch``: the most
    sequences in a step; both default to what the artifact was compiled for, or what fits the memory. ``kv_memory``: bytes for the
    KV cache; default on a GPU what is free, elsewhere two full contexts, and at most half of the available memory, committed as
    it fills.

    Raises ArtifactError if the artifact is missing, damaged, or not for this machine or version; RequestError for values
    that cannot be, or a GPU that is too small; MissingExtraError if the runtime packages are not installed.
    """
    artifact = open_artifact(path)
    m = artifact.manifest
    length = bounded("context", context, m.model.context)
    batch = bounded("max_batch", max_batch, m.limits.max_batch)
    free, make = _device(artifact, threads)
    pages = kv_page_count(m, length, batch, kv_memory, free)
    length, batch = fitted(m, pages, context, max_batch)
    return Model(m, make(pages), artifact.folder, context=length, max_batch=batch)


def _device(artifact: Artifact, threads: int | None) -> tuple[Memory, Callable[[int], Executor]]:
    """The memory that KV pages may come from, and what makes the executor over so many pages."""
    if artifact.variant.kind == "cpu":
        return Memory(memory().available), lambda pages: TvmExecutor(artifact, pages, threads)
    if threads is not None:
        raise RequestError(f"threads={threads} cannot be: {artifact.variant.target} computes on the GPU: leave threads out")
    if artifact.variant.kind == "metal":
        from llmc.runtime.gpu.metal import MetalExecutor

        return Memory(memory().available), lambda pages: MetalExecutor(artifact, pages)
    executor = _gpu_executor(artifact.variant.kind)
    return Memory(executor.available_memory(artifact), exclusive=True), lambda pages: executor(artifact, pages)


def _gpu_executor(kind: str) -> type[GpuExecutor]:
    module, name = _EXECUTORS[kind]
    found: type[GpuExecutor] = getattr(import_module(f"llmc.runtime.gpu.{module}"), name)
    return found
