"""What a loaded artifact takes of its device's memory beside the KV cache, known from the manifest alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from llmc.manifest import Manifest, Variant
from llmc.runtime.draws import FIELDS
from llmc.runtime.tensors import storage_dtype

TENSOR_ALIGNMENT = 256
"""Bytes between the starts of tensors on a GPU: what cudaMalloc itself aligns to, and TMA asks for half of."""

_POOL_PAGE = 4096
"""TVM's pooled allocator rounds storages up to this, and reuses one for another of exactly its size."""

_GPU_BLOCK = 2 << 20
"""CUDA's allocations of a megabyte and more come in such blocks."""


@dataclass(frozen=True)
class Footprint:
    """Bytes. ``workspace``: intermediates of the largest steps; ``buffers``: logits, index arrays, token counts for penalties."""

    weights: int
    workspace: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.buffers


def aligned(nbytes: int, to: int = TENSOR_ALIGNMENT) -> int:
    """``nbytes`` rounded up to a multiple of ``to``."""
    return -(-nbytes // to) * to


def argument_sizes(m: Manifest) -> dict[str, int]:
    """Elements of each index array of a step (int32) at the limits, in the order of the block that holds them."""
    limits = m.limits
    rows = max(limits.max_rows, limits.max_batch)
    return {
        "input_ids": rows,
        "positions": rows,
        "slot_mapping": rows,
        "q_indptr": limits.max_batch + 1,
        "seq_lens": limits.max_batch,
        "logit_rows": max(limits.max_logit_rows, 1),
        "draws": limits.max_batch * len(FIELDS),
        "draw_positions": limits.max_batch,
        "block_table": limits.max_batch * -(-m.model.context // m.kv.page_size),
    }


def workspace_bytes(variant: Variant) -> int:
    """What the storages of all functions take in the pool that they share: of each size, as many as one function needs at once."""
    most: Counter[int] = Counter()
    for function in variant.functions:
        most |= Counter(aligned(size, _POOL_PAGE) for size in function.storages)
    if variant.kind != "cpu":
        return sum(count * (aligned(size, _GPU_BLOCK) if size >= _GPU_BLOCK // 2 else size) for size, count in most.items())
    return sum(count * size for size, count in most.items())


def footprint(m: Manifest, variant: Variant) -> Footprint:
    """The memory of ``variant`` at the manifest's limits."""
    limits, vocab = m.limits, m.model.vocab_size
    tensors = [m.tensors[name] for name in variant.weights]
    weights = sum(aligned(prod(t.shape) * storage_dtype(t.dtype).itemsize) for t in tensors)
    buffers = 4 * max(limits.max_logit_rows, limits.max_batch) * vocab
    buffers += sum(aligned(4 * size) for size in argument_sizes(m).values())
    if variant.kind != "cpu":
        buffers += 2 * limits.max_batch * vocab
    return Footprint(weights, workspace_bytes(variant), buffers)
