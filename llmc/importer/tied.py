"""Tied weights: parameters that are one tensor under several names (embedding and output head, most often)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmc.importer.params import Source

_ROWS = 1 << 12  # rows compared in one go


def tied_groups(model: Any) -> list[list[str]]:
    """The groups of state-dict names that share a tensor, each with the name that transformers treats as the original first.

    By identity of the parameters, and by ``all_tied_weights_keys`` (``{tied name: original name}``).
    """
    declared: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    group_of: dict[str, list[str]] = {name: group for group in same.values() for name in group}
    for name, original in declared.items():
        first, second = group_of.get(original, [original]), group_of.get(name, [name])
        if first is not second:
            first.extend(second)
            group_of.update(dict.fromkeys(first, first))
    unique = {id(g): g for g in group_of.values() if len(g) > 1}
    return [sorted(g, key=lambda n: n in declared) for g in unique.values()]


def _equal(a: Source, b: Source) -> bool:
    """Whether two sources hold the same bits; reads both, a few rows in memory at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.read().reshape(a.shape[0] if a.shape else 1, -1), b.read().reshape(b.shape[0] if b.shape else 1, -1)
    return all(np.array_equal(x[i : i + _ROWS].view(np.uint8), y[i : i + _ROWS].view(np.uint8)) for i in range(0, len(x), _ROWS))


def _untie(model: Any, name: str) -> None:
    """Give ``name`` a parameter of its own again, as transformers does when a checkpoint stores two different tensors."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    setattr(module, leaf, torch.nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad))
    (getattr(model, "all_tied_weights_keys", None) or {}).pop(name, None)


def resolve_ties(model: Any, found: dict[str, Source]) -> dict[str, str]:
    """Tied names -> the name whose entry in ``found`` holds the data. Drops tied duplicates from ``found``.

    A group that the checkpoint stores several times is compared: equal tensors are tied, a different one is untied in ``model``.
    """
    tied: dict[str, str] = {}
    for group in tied_groups(model):
        present = [n for n in group if n in found]
        if not present:
            continue
        holder = present[0]
        for name in group:
            if name == holder:
                continue
            if name in found and not _equal(found[holder], found[name]):
                _untie(model, name)
                continue
            found.pop(name, None)
            tied[name] = holder
    return tied
