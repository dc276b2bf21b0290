"""``--target-bpw``: a scheme for every matrix, so that the model comes to a given number of bits per weight and loses least.

The loss of each choice is predicted from :mod:`.sensitivity`. Of each unit's choices only those on the lower convex hull of
(bits, loss) count; starting from the fewest bits everywhere, the step that saves the most loss per bit is taken, for as long as
one fits (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988: optimal but for the last step).
"""

from __future__ import annotations

from math import prod

import numpy as np

from llmc.errors import UsageError
from llmc.importer.params import DTYPES, Param, ParamTable
from llmc.passes.quantize.forward import Progress
from llmc.passes.quantize.options import FINEST
from llmc.passes.quantize.scheme import Scheme, scheme
from llmc.passes.quantize.sensitivity import Unit, measure
from llmc.passes.rewrite import Graph
from llmc.schedules import layouts
from llmc.targets.base import Target

CANDIDATES = ("int2z_g32", "int3z_g64", "int4z_g64", "int5z_g64", "int6_g64", FINEST)
TOKENS = 128
"""Of the calibration text that sensitivity is measured on."""

Choice = tuple[float, float, Scheme]
"""(bits of the whole unit, expected loss, scheme)"""


def spend(
    graph: Graph, params: ParamTable, free: set[str], target_bpw: float, target: Target, text: np.ndarray, progress: Progress
) -> None:
    """Set the scheme of every matrix in ``free``; ``text``: token ids [length].

    Raises UsageError if the fewest bits that the candidates take are more than the target.
    """
    schemes = [scheme(name) for name in CANDIDATES]
    units = measure(graph, params, free, schemes, text[:TOKENS], progress)
    total = sum(prod(p.shape) for p in params.values())
    measured = {param.name for unit in units for param in unit.params}
    fixed = sum(_bits(p) for p in params.values() if p.name not in measured)
    choices = [_choices(unit, schemes, target) for unit in units]
    try:
        chosen = allocate(choices, target_bpw * total - fixed)
    except ValueError:
        least = (fixed + sum(min(bits for bits, _, _ in c) for c in choices)) / total
        raise UsageError(
            f"--target-bpw {target_bpw:g} is less than the {least:.2f} bits per weight that this model takes at least on "
            f"{target.name}, norms and what --keep names among them: ask for more"
        ) from None
    for unit, how in zip(units, chosen, strict=True):
        for param in unit.params:
            param.scheme = how.name


def _bits(param: Param) -> float:
    """Of a parameter as it is to be stored."""
    each = scheme(param.scheme).bits_per_weight(param.shape[-1]) if param.scheme else 8 * DTYPES[param.dtype].itemsize
    return each * prod(param.shape)


def _choices(unit: Unit, schemes: list[Scheme], target: Target) -> list[Choice]:
    """What ``target`` can store all matrices of the unit by."""
    return [
        (sum(how.bits_per_weight(p.shape[1]) * prod(p.shape) for p in unit.params), unit.loss(how), how)
        for how in schemes
        if all(layouts.choose(how, p.shape[0], p.shape[1], target)[0] is not None for p in unit.params)
    ]


def hull(choices: list[Choice]) -> list[Choice]:
    """Those on the lower convex hull, by rising bits: each step saves less loss per bit than the one before."""
    kept: list[Choice] = []
    for bits, loss, how in sorted(choices, key=lambda c: c[:2]):
        if kept and loss >= kept[-1][1]:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], (bits, loss, how)):
            kept.pop()
        kept.append((bits, loss, how))
    return kept


def _gain(a: Choice, b: Choice) -> float:
    """Loss saved per bit on the way from a to b."""
    return (a[1] - b[1]) / (b[0] - a[0])


def allocate(choices: list[list[Choice]], budget: float) -> list[Scheme]:
    """One scheme for each unit, in at most ``budget`` bits. Raises ValueError if there is no such allocation."""
    hulls = [hull(c) for c in choices]
    at = [0] * len(hulls)
    left = budget - sum(h[0][0] for h in hulls)
    if left < 0:
        raise ValueError(f"the least is {budget - left:.0f} bits")
    steps = [(_gain(h[i], h[i + 1]), u, i) for u, h in enumerate(hulls) for i in range(len(h) - 1)]
    for _, unit, i in sorted(steps, key=lambda s: -s[0]):
        price = hulls[unit][i + 1][0] - hulls[unit][i][0]
        if at[unit] == i and price <= left:
            at[unit], left = i + 1, left - price
    return [h[i][2] for h, i in zip(hulls, at, strict=True)]
