"""The pages of the KV cache: who holds which, counted exactly (Kwon et al., 2023, "PagedAttention").

A sequence's :class:`BlockTable` lists the pages that hold its positions. Forked tables share pages by reference count; a
table that is about to write into a shared page gets a copy of its own first (copy on write).
"""

from __future__ import annotations

from collections.abc import Callable

from llmc.errors import RequestError


class OutOfPagesError(RequestError):
    """The KV cache has fewer free pages than a sequence needs."""


class PageAllocator:
    """Hands out ``num_pages`` pages of ``page_size`` positions. A page is free when nobody holds it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # taken from the end, so that low pages are used first and untouched memory stays uncommitted
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages held at least once."""
        return self.num_pages - len(self._free)

    def pages_for(self, positions: int) -> int:
        """Pages that ``positions`` positions fill."""
        return -(-positions // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages, held once each. Raises OutOfPagesError, taking none, if fewer are free."""
        if count > len(self._free):
            raise OutOfPagesError(
                f"the KV cache is full: {count} more pages of {self.page_size} tokens are needed and {len(self._free)} of "
                f"{self.num_pages} are free: send fewer or shorter prompts at once, or load the model with a larger kv_memory"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Hold each of ``pages``, which somebody holds already, once more."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """Give up one hold of each of ``pages``; those that nobody holds any more are free again."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether more than one table holds ``page``."""
        return self._holders[page] > 1


class BlockTable:
    """The pages of one sequence, in order. ``length``: the positions in them that hold keys and values."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self.page_size = allocator.page_size
        self.pages: list[int] = []
        self.length = 0

    def reserve(self, count: int, copy_page: Callable[[int, int], None]) -> None:
        """Make the next ``count`` positions writable: add pages, and copy those that are shared (``copy_page(source, target)``).

        Raises OutOfPagesError with the table as it was.
        """
        allocator = self._allocator
        first = self.length // allocator.page_size
        shared = [i for i in range(first, len(self.pages)) if allocator.is_shared(self.pages[i])]
        more = max(0, allocator.pages_for(self.length + count) - len(self.pages))
        fresh = allocator.allocate(len(shared) + more)
        for i, page in zip(shared, fresh, strict=False):
            copy_page(self.pages[i], page)
            allocator.release([self.pages[i]])
            self.pages[i] = page
        self.pages += fresh[len(shared) :]

    def advance(self, count: int) -> None:
        """Note that the next ``count`` positions were written."""
        self.length += count

    def fork(self) -> BlockTable:
        """A table with the same contents, which shares every page."""
        twin = BlockTable(self._allocator)
        self._allocator.share(self.pages)
        twin.pages = list(self.pages)
        twin.length = self.length
        return twin

    def release(self) -> None:
        """Give up every page; the table is empty then and may be filled again. Releasing twice does no harm."""
        self._allocator.release(self.pages)
        self.pages = []
        self.length = 0
