"""Page accounting: what is allocated, shared and copied comes back, and a refusal takes nothing."""

from __future__ import annotations

import random

import pytest

from llmc.runtime.pages import BlockTable, OutOfPagesError, PageAllocator


def no_copy(source: int, target: int) -> None:
    raise AssertionError(f"page {source} was copied to {target} without need")


def test_reserve_takes_only_what_the_positions_need() -> None:
    allocator = PageAllocator(5, 4)
    table = BlockTable(allocator)
    table.reserve(4, no_copy)
    assert len(table.pages) == 1
    table.advance(4)
    table.reserve(5, no_copy)
    assert len(table.pages) == 3
    table.advance(5)
    table.reserve(3, no_copy)
    assert allocator.used == 3
    table.release()
    table.release()
    assert allocator.free == 5


def test_out_of_pages_takes_nothing_and_names_the_numbers() -> None:
    allocator = PageAllocator(3, 4)
    table = BlockTable(allocator)
    table.reserve(8, no_copy)
    table.advance(8)
    with pytest.raises(OutOfPagesError, match=r"2 more pages of 4 tokens are needed and 1 of 3 are free"):
        table.reserve(8, no_copy)
    assert (allocator.free, len(table.pages), table.length) == (1, 2, 8)


def test_fork_copies_only_the_page_that_is_written() -> None:
    allocator = PageAllocator(10, 4)
    table = BlockTable(allocator)
    table.reserve(10, no_copy)
    table.advance(10)
    twin = table.fork()
    assert twin.pages == table.pages
    assert allocator.used == 3
    copies: list[tuple[int, int]] = []
    twin.reserve(1, lambda source, target: copies.append((source, target)))
    assert copies == [(table.pages[2], twin.pages[2])]
    assert twin.pages[:2] == table.pages[:2]
    assert twin.pages[2] != table.pages[2]
    # the other one owns the old page alone now
    table.reserve(1, no_copy)
    assert allocator.used == 4
    table.release()
    assert allocator.used == 3
    twin.release()
    assert allocator.used == 0


def test_fork_on_a_page_boundary_copies_nothing() -> None:
    allocator = PageAllocator(4, 4)
    table = BlockTable(allocator)
    table.reserve(8, no_copy)
    table.advance(8)
    twin = table.fork()
    twin.reserve(1, no_copy)
    table.reserve(1, no_copy)
    assert allocator.used == 4
    with pytest.raises(OutOfPagesError):
        twin.fork().reserve(1, no_copy)


def test_random_use_never_loses_a_page() -> None:
    allocator = PageAllocator(23, 3)
    rng = random.Random(5)
    tables: list[BlockTable] = []
    for _ in range(2000):
        action = rng.random()
        if action < 0.3 or not tables:
            tables.append(BlockTable(allocator))
        elif action < 0.45:
            tables.append(rng.choice(tables).fork())
        elif action < 0.65:
            tables.pop(rng.randrange(len(tables))).release()
        else:
            table, count = rng.choice(tables), rng.randint(1, 7)
            try:
                table.reserve(count, lambda source, target: None)
            except OutOfPagesError:
                continue
            assert not any(allocator.is_shared(table.pages[p // 3]) for p in range(table.length, table.length + count))
            table.advance(count)
        held = {page for t in tables for page in t.pages}
        assert allocator.used == len(held)
    for table in tables:
        table.release()
    assert allocator.free == 23
    assert sorted(allocator.allocate(23)) == list(range(23))
