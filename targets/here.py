"""Whether this machine runs what is compiled for a target."""

from __future__ import annotations

from llmc.manifest import Variant
from llmc.runtime.artifact import gpus_of, refusal
from llmc.runtime.host import host
from llmc.targets.base import Target


def refused(target: Target) -> str | None:
    """Why code for ``target`` does not run on this machine, as one clause; None if it does."""
    built = Variant(target.name, target.name, target.kind, target.triple, target.mcpu, list(target.features), "", [], [], [])
    return refusal(built, host(), gpus_of([target.kind]))
