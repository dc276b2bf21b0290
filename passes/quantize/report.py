"""How an artifact stores its weights, for people: one line for all tensors of a kind.

``Stored`` records come from the passes; ``rows`` groups those that differ in a layer's number alone; ``table`` is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

VECTORS = "vectors (norms, biases)"


@dataclass
class Stored:
    """How one weight is stored.

    ``scheme``: the scheme's name, or the dtype; ``bits`` per weight; ``error``: Frobenius norm of the rounding error over that of
    the matrix, 0 for codes taken over as they are, None for what was not rounded; ``reason``: why it is not quantized, or what
    else there is to say.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    bits: float
    error: float | None = None
    reason: str = ""


@dataclass
class Row:
    """A line of the table. ``weights``: how many numbers all its tensors hold; ``error``: root mean square over them."""

    name: str
    count: int
    weights: int
    scheme: str
    bits: float
    error: float | None
    reason: str


def rows(stored: Iterable[Stored]) -> list[Row]:
    """``stored`` in lines, in order. A tensor that several variants store alike counts once."""
    unique: dict[tuple[str, str], Stored] = {}
    for record in stored:
        held = unique.setdefault((record.name, record.scheme), record)
        if held.error is None and record.error is not None:
            unique[record.name, record.scheme] = record
    groups: dict[tuple[Any, ...], list[Stored]] = {}
    for record in unique.values():
        name = VECTORS if len(record.shape) < 2 else re.sub(r"(?<=\.)\d+(?=\.)", "*", record.name)
        shape = () if name == VECTORS else record.shape
        groups.setdefault((name, record.scheme, shape, record.reason), []).append(record)
    return sorted((_row(key[0], members) for key, members in groups.items()), key=lambda r: r.name == VECTORS)


def _row(name: str, members: list[Stored]) -> Row:
    sizes = [prod(m.shape) for m in members]
    errors = [m.error for m in members if m.error is not None]
    error = sqrt(sum(e * e for e in errors) / len(errors)) if errors else None
    bits = sum(m.bits * size for m, size in zip(members, sizes, strict=True)) / max(1, sum(sizes))
    return Row(name, len(members), sum(sizes), members[0].scheme, bits, error, members[0].reason)


def bits_per_weight(lines: Iterable[Row]) -> float:
    """Average over everything."""
    listed = list(lines)
    return sum(r.bits * r.weights for r in listed) / max(1, sum(r.weights for r in listed))


def table(lines: list[Row]) -> list[str]:
    """The rows as aligned text, with a line of totals."""
    cells = [("weights", "", "scheme", "bits", "error", "")]
    cells += [(r.name, f"{r.count} ×", r.scheme, f"{r.bits:.2f}", _percent(r.error), r.reason) for r in lines]
    cells.append(("all", "", "", f"{bits_per_weight(lines):.2f}", "", ""))
    widths = [max(len(c[i]) for c in cells) for i in range(5)]
    return [
        f"{c[0]:<{widths[0]}}  {c[1]:>{widths[1]}} {c[2]:<{widths[2]}}  {c[3]:>{widths[3]}}  {c[4]:>{widths[4]}}  {c[5]}".rstrip()
        for c in cells
    ]


def _percent(error: float | None) -> str:
    if error is None:
        return "-"
    return "exact" if error == 0 else f"{100 * error:.2g} %"
