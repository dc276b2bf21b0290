"""Drives the two compiled phases over several sequences with scattered pages, and collects the logits of every position.

What executes a phase is a callable, so the same schedule checks the graphs (through the interpreter) and the machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.kv_layout import page_layout
from llmc.manifest import KvLayer

RunPhase = Callable[[str, dict[str, np.ndarray], int], np.ndarray]
"""``(phase, state tensors by name, rows of the result) -> logits``; KV pages are the callable's own matter."""


def page_shapes(layers: Sequence[KvLayer], num_pages: int, page_size: int, kv_dtype: str = "float32") -> list[tuple[int, ...]]:
    """Of the page tensors; every float dtype has the same."""
    widths = [page_layout(kv_dtype, page_size, layer.k_dim, layer.v_dim).width for layer in layers]
    return [(num_pages, layer.heads, width) for layer, width in zip(layers, widths, strict=True)]


@dataclass
class Stepper:
    """``sequences``: the token ids of each. ``run`` executes a phase. Pages are handed out in a shuffled order."""

    run: RunPhase
    sequences: list[np.ndarray]
    page_size: int
    num_pages: int
    seed: int = 0
    done: list[int] = field(default_factory=list)
    logits: list[dict[int, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = [0 for _ in self.sequences]
        self.logits = [{} for _ in self.sequences]
        self._free = list(np.random.default_rng(self.seed).permutation(self.num_pages))
        self._pages: list[list[int]] = [[] for _ in self.sequences]

    def _slot(self, s: int, position: int) -> int:
        while len(self._pages[s]) <= position // self.page_size:
            self._pages[s].append(int(self._free.pop()))
        return self._pages[s][position // self.page_size] * self.page_size + position % self.page_size

    def _state(self, items: Sequence[tuple[int, int]]) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
        rows = [(s, p) for s, count in items for p in range(self.done[s], self.done[s] + count)]
        slots = [self._slot(s, p) for s, p in rows]
        width = max(len(self._pages[s]) for s, _ in items)
        table = np.full((len(items), width), -1, np.int32)
        for i, (s, _) in enumerate(items):
            table[i, : len(self._pages[s])] = self._pages[s]
        state = {
            "input_ids": [int(self.sequences[s][p]) for s, p in rows],
            "positions": [p for _, p in rows],
            "slot_mapping": slots,
            "q_indptr": np.cumsum([0, *(count for _, count in items)]),
            "seq_lens": [self.done[s] + count for s, count in items],
        }
        arrays = {name: np.asarray(value, np.int32) for name, value in state.items()}
        return {**arrays, "block_table": np.where(table < 0, 0, table)}, rows

    def extend(self, items: Sequence[tuple[int, int]], wanted: Sequence[int] | None = None) -> None:
        """One ragged step: ``items`` are (sequence, tokens); ``wanted`` the rows with logits (default: all)."""
        state, rows = self._state(items)
        wanted = list(range(len(rows))) if wanted is None else list(wanted)
        state["logit_rows"] = np.asarray(wanted, np.int32)
        self._keep(self.run("extend", state, len(wanted)), [rows[i] for i in wanted], items)

    def decode(self, sequences: Sequence[int]) -> None:
        """One token for each of ``sequences``."""
        items = [(s, 1) for s in sequences]
        state, rows = self._state(items)
        self._keep(self.run("decode", state, len(rows)), rows, items)

    def _keep(self, result: np.ndarray, rows: Sequence[tuple[int, int]], items: Sequence[tuple[int, int]]) -> None:
        for (s, position), row in zip(rows, result, strict=True):
            self.logits[s][position] = row
        for s, count in items:
            self.done[s] += count


def mixed_schedule(stepper: Stepper) -> None:
    """Chunked prefill of one sequence beside others, mixed steps, single and joint decodes. Sequences of 11, 7 and 5 tokens."""
    stepper.extend([(0, 5), (1, 3)])
    stepper.extend([(0, 3), (1, 1), (2, 2)], wanted=[2, 5])
    stepper.decode([2, 0])
    stepper.decode([1])
    stepper.extend([(2, 2), (0, 2)], wanted=[3])
    stepper.decode([1])
    stepper.extend([(1, 1)])
