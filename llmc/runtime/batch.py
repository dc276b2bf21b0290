"""One step of the model: which rows of which sequences run, as the arrays that the compiled module takes."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from llmc.runtime.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next ``rows`` pending tokens of a sequence, whose pages are reserved; logits for the last ``logits`` of the rows."""

    sequence: Sequence
    rows: int
    logits: int


@dataclass(frozen=True)
class Step:
    """The arguments of ``decode`` and ``extend`` (:mod:`llmc.manifest`), all int32 arrays.

    ``input_ids``, ``positions``, ``slot_mapping``: [n]. ``q_indptr``: [b + 1]. ``seq_lens``: [b], with this step's rows.
    ``block_table``: [b, m]. ``logit_rows``: [r], the rows whose logits are wanted; None for the decode phase, which gives all.
    ``pages``: how many entries of each row of the block table there are.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    q_indptr: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray
    logit_rows: np.ndarray | None
    pages: tuple[int, ...] = ()


def build_step(chunks: Items[Chunk]) -> Step:
    """The step that runs ``chunks``, in order. It is a decode step if every chunk is one row whose logits are wanted.

    A step in which no logits are wanted asks for those of its last row, since a module gives at least one row.
    """
    ids: list[int] = []
    positions: list[np.ndarray] = []
    indptr = [0]
    wanted: list[int] = []
    width = max(len(c.sequence.table.pages) for c in chunks)
    table = np.zeros((len(chunks), width), np.int32)
    for i, chunk in enumerate(chunks):
        block = chunk.sequence.table
        run = range(block.length, block.length + chunk.rows)
        ids += chunk.sequence.tokens[run.start : run.stop]
        positions.append(np.arange(run.start, run.stop, dtype=np.int32))
        indptr.append(indptr[-1] + chunk.rows)
        wanted += range(indptr[-1] - chunk.logits, indptr[-1])
        table[i, : len(block.pages)] = block.pages
    decode = all(c.rows == 1 and c.logits == 1 for c in chunks)
    at, size = np.concatenate(positions), chunks[0].sequence.table.page_size
    owner = np.repeat(np.arange(len(chunks)), [c.rows for c in chunks])
    slots = table[owner, at // size] * size + at % size
    return Step(
        input_ids=np.array(ids, np.int32),
        positions=at,
        slot_mapping=slots.astype(np.int32),
        q_indptr=np.array(indptr, np.int32),
        seq_lens=np.array([c.sequence.table.length + c.rows for c in chunks], np.int32),
        block_table=table,
        logit_rows=None if decode else np.array(wanted or [indptr[-1] - 1], np.int32),
        pages=tuple(len(c.sequence.table.pages) for c in chunks),
    )
