"""Families whose configuration falls into parts, each of which decides at some sizes alone.

Such a family holds several kernels and picks one by its sizes when it is called. Trying every combination of their configurations
would be hopeless and pointless: at 8 rows nothing of what the kernel for 1000 rows does can be seen. So each part is searched,
measured and recorded as a space of its own, whose configurations have its axis alone. The family exposes

- ``parts(call, target) -> dict[str, list[dict[str, int]]]``: for each axis that is a part, the sizes it is measured at;
- ``build_part(call, target, axis, value) -> PrimFunc``: the kernel that ``value`` of the part's axis stands for, by itself;
- ``KERNELS``: the families of these kernels, by name; a value of a part's axis is a dictionary that has the name as its
  ``"kernel"`` and beside it that kernel's configuration, and stands for the same code in every part.

Which phase a call is from makes no difference to such a family: sizes decide.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

from llmc.schedules.protocol import KernelCall

Config = dict[str, Any]
Space = dict[str, list[Any]]


def has_parts(family: Any) -> bool:
    return hasattr(family, "parts")


def kept_under(family: Any, call: KernelCall) -> tuple[Any, KernelCall]:
    """The family and the call that records of ``call`` are kept under.

    ``measured_as(call)`` if the family has that function, because its configurations are another family's; and one call for both
    phases if the family has parts.
    """
    if hasattr(family, "measured_as"):
        family, call = family.measured_as(call)
    return family, (replace(call, phase="decode") if has_parts(family) else call)


def spaces(family: Any, call: KernelCall, target: Any) -> list[Space]:
    """The spaces that are searched one by one: that of each part, or the family's whole space."""
    space: Space = family.space(call, target)
    return [{axis: space[axis]} for axis in family.parts(call, target)] if has_parts(family) else [space]


def build(family: Any, call: KernelCall, target: Any, config: Config) -> Any:
    """The PrimFunc of a configuration of any of :func:`spaces`, or of the family's whole space."""
    if not _of_part(family, config):
        return family.build(call, target, config)
    ((axis, value),) = config.items()
    return family.build_part(call, target, axis, value)


def _of_part(family: Any, config: Config) -> bool:
    return has_parts(family) and len(config) == 1


@cache
def _kernel_name(config: str) -> str:
    value, *others = json.loads(config).values()
    return str(value.get("kernel", "")) if isinstance(value, dict) and not others else ""


def kernel_of(family: Any, config: str) -> Any:
    """The family of the kernel that a part's configuration (as text) stands for; None if there is none of its name."""
    return family.KERNELS.get(_kernel_name(config))


def built_by(family: Any, config: Config) -> Any:
    """What decides the code that :func:`build` makes of a configuration: equal for equal code."""
    return next(iter(config.values())) if _of_part(family, config) else config


def part_of(family: Any, call: KernelCall, target: Any, rows: int) -> str:
    """The axis that decides about ``rows`` rows: "" of a family without parts."""
    if not has_parts(family):
        return ""
    parts = family.parts(call, target)
    return next((axis for axis, sizes in parts.items() if rows <= sizes[-1]["n"]), list(parts)[-1])


def by_rows(buckets: dict[str, int | None], many: int) -> dict[str, list[dict[str, int]]]:
    """Parts for ranges of rows that end where ``buckets`` says: the most rows of each, one row too for the first, ``many`` for a
    range without an end."""
    found = {axis: [{"n": most or many}] for axis, most in buckets.items()}
    first = next(iter(found))
    return found if buckets[first] == 1 else {**found, first: [{"n": 1}, *found[first]]}
