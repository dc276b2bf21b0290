"""Whether this machine runs what is compiled for a target."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.manifest import Variant
from llmc.runtime.artifact import Gpu, gpus_of, refusal
from llmc.runtime.host import host
from llmc.targets.base import Target


def refused(target: Target, gpus: Sequence[Gpu] | None = None) -> str | None:
    """Why code for ``target`` does not run on this machine, as one clause; None if it does. ``gpus``: those of the machine, if they
    are known already."""
    built = Variant(target.name, target.name, target.kind, target.triple, target.mcpu, list(target.features), "", [], [], [])
    return refusal(built, host(), gpus_of([target.kind]) if gpus is None else gpus)
