"""A sequence: its tokens, and how many of them the KV cache already holds."""

from __future__ import annotations

from llmc.runtime.pages import BlockTable, PageAllocator


class Sequence:
    """Tokens and their block table. ``tokens[table.length:]`` have yet to be run; the last of them gives the next token.

    A sequence whose pages were taken away (``table.release()``) is whole again once its tokens have been run anew.
    """

    def __init__(self, tokens: list[int], allocator: PageAllocator) -> None:
        self.tokens = list(tokens)
        self.table = BlockTable(allocator)

    @property
    def pending(self) -> int:
        """Tokens that have yet to be run."""
        return len(self.tokens) - self.table.length

    def fork(self) -> Sequence:
        """A sequence with the same tokens that shares this one's pages."""
        twin = Sequence.__new__(Sequence)
        twin.tokens = list(self.tokens)
        twin.table = self.table.fork()
        return twin
