"""``llmc.load``: from an artifact's folder to a running model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmc.errors import RequestError
from llmc.manifest import Manifest
from llmc.runtime.artifact import Artifact, open_artifact
from llmc.runtime.executor import Executor, TvmExecutor
from llmc.runtime.host import memory
from llmc.runtime.model import Model, bounded

_MEMORY_SHARE = 0.5
"""The most of the memory now available that the KV cache takes unless told otherwise."""


def kv_page_count(m: Manifest, context: int, max_batch: int, kv_memory: int | None, available: int) -> int:
    """Pages of KV cache for ``max_batch`` sequences of ``context`` tokens, as far as the memory goes (all in bytes).

    ``kv_memory`` bounds it if given; otherwise two full contexts and half of the ``available`` memory do, whichever is less.
    Raises RequestError if ``kv_memory`` does not hold a page.
    """
    size = m.kv.page_size
    per_page = m.kv.bytes_per_token * size
    per_sequence = -(-context // size)
    wanted = per_sequence * max_batch
    if kv_memory is None:
        limit = min(2 * per_sequence, int(available * _MEMORY_SHARE) // max(per_page, 1))
        return max(1, min(wanted, limit))
    if kv_memory < per_page:
        raise RequestError(
            f"kv_memory={kv_memory} bytes holds no page of {size} tokens ({per_page} bytes): "
            f"a full context of {context} tokens takes {per_sequence * per_page} bytes"
        )
    return min(wanted, kv_memory // max(per_page, 1))


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
    sequences in a step; both default to what the artifact was compiled for. ``kv_memory``: bytes for the KV cache, committed
    as it fills; default two full contexts, and at most half of the available memory.

    Raises ArtifactError if the artifact is missing, damaged, or not for this machine or version; RequestError for values
    that cannot be; MissingExtraError if the runtime packages are not installed.
    """
    artifact = open_artifact(path)
    m = artifact.manifest
    length = bounded("context", context, m.model.context)
    batch = bounded("max_batch", max_batch, m.limits.max_batch)
    available, make = _device(artifact, threads)
    pages = kv_page_count(m, length, batch, kv_memory, available)
    return Model(m, make(pages), artifact.folder, context=length, max_batch=batch)


def _device(artifact: Artifact, threads: int | None) -> tuple[int, Callable[[int], Executor]]:
    """The memory that KV pages may come from, and what makes the executor over so many pages."""
    if artifact.variant.kind != "cuda":
        return memory().available, lambda pages: TvmExecutor(artifact, pages, threads)
    from llmc.runtime.cuda import CudaExecutor, available_memory

    if threads is not None:
        raise RequestError(f"threads={threads} cannot be: {artifact.variant.target} computes on the GPU: leave threads out")
    return available_memory(artifact), lambda pages: CudaExecutor(artifact, pages)
