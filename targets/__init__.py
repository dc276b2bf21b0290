"""The machines llmc compiles for: one module per kind, each with the functions of :class:`llmc.targets.base.TargetModule`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from types import ModuleType

from llmc.errors import UsageError
from llmc.targets.base import Target

KINDS = ("cpu", "cuda", "rocm", "metal", "opencl")


def known_specs() -> list[str]:
    """Target names a user may start from; ``cpu:<name>`` takes any processor that LLVM knows besides."""
    return [spec for kind in KINDS for spec in _module(kind).known_specs()]


def parse(spec: str) -> Target:
    """The target that ``spec`` names (``"cpu:x86-64-v3"``). Raises UsageError with what there is and the nearest name."""
    kind = spec.split(":", 1)[0]
    if kind not in KINDS:
        near = difflib.get_close_matches(spec, known_specs(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown target {spec!r}: there is {', '.join(known_specs())}{hint}")
    return _module(kind).parse(spec)


def parse_all(specs: str | Sequence[str]) -> list[Target]:
    """The targets that ``specs`` name, in order, each once. ``"cuda:sm_80,sm_90a"`` is short for two of one kind.

    Raises UsageError for a name that is unknown, or if there is none.
    """
    names: list[str] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        kind, separator, rest = spec.partition(":")
        names += [f"{kind}:{part.strip()}" for part in rest.split(",")] if separator else [spec]
    found = {target.name: target for target in map(parse, names)}
    if not found:
        raise UsageError(f"no target was named: choose from {', '.join(known_specs())}")
    return list(found.values())


def module_for(target: Target) -> ModuleType:
    """The module that builds for ``target``."""
    return _module(target.kind)


def _module(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise UsageError(f"unknown target kind {kind!r}: there is {', '.join(KINDS)}")
    return importlib.import_module(f"llmc.targets.{kind}")
