"""The arrays of a step."""

from __future__ import annotations

from llmc.runtime.batch import Chunk, build_step
from llmc.runtime.pages import PageAllocator
from llmc.runtime.sequence import Sequence


def _sequence(tokens: int, length: int, pages: list[int]) -> Sequence:
    found = Sequence(list(range(100, 100 + tokens)), PageAllocator(9, 4))
    found.table.pages, found.table.length = pages, length
    return found


def test_slots_follow_the_pages_from_the_middle_of_one_on() -> None:
    """A chunk over two page ends, one from a page's first position on, and one without rows."""
    chunks = [
        Chunk(_sequence(11, 2, [3, 0, 4]), 9, 1),
        Chunk(_sequence(12, 8, [7, 5, 1]), 2, 0),
        Chunk(_sequence(3, 3, [6]), 0, 0),
        Chunk(_sequence(4, 3, [8]), 1, 1),
    ]
    step = build_step(chunks)
    assert step.slot_mapping.tolist() == [14, 15, 0, 1, 2, 3, 16, 17, 18, 4, 5, 35]
    assert step.positions.tolist() == [*range(2, 11), 8, 9, 3]
    assert step.input_ids.tolist() == [*range(102, 111), 108, 109, 103]
    assert step.q_indptr.tolist() == [0, 9, 11, 11, 12] and step.seq_lens.tolist() == [11, 10, 3, 4]
    assert step.block_table.tolist() == [[3, 0, 4], [7, 5, 1], [6, 0, 0], [8, 0, 0]] and step.pages == (3, 3, 1, 1)
    assert step.logit_rows is not None and step.logit_rows.tolist() == [8, 11]
    assert all(a.dtype == "int32" for a in (step.slot_mapping, step.positions, step.block_table))


def test_one_row_each_is_a_decode_step() -> None:
    step = build_step([Chunk(_sequence(5, 4, [2, 1]), 1, 1), Chunk(_sequence(1, 0, [0]), 1, 1)])
    assert step.logit_rows is None and step.slot_mapping.tolist() == [4, 0]
