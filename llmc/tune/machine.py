"""Whether kernels for a target can be timed: known before the model is read."""

from __future__ import annotations

from llmc.errors import UsageError
from llmc.manifest import Variant
from llmc.runtime.artifact import gpus_of, refusal
from llmc.runtime.host import host
from llmc.targets.base import Target

KINDS = ("cpu", "cuda")
"""Of the targets whose kernels :mod:`llmc.tune.devices` can time."""


def check_target(target: Target, here: bool) -> None:
    """Raise UsageError unless kernels for ``target`` can be timed, and if ``here``, on this machine."""
    if target.kind not in KINDS:
        raise UsageError(f"llmc tune times kernels on processors and NVIDIA GPUs, and {target.name} is neither")
    built = Variant(target.name, target.name, target.kind, target.triple, target.mcpu, list(target.features), "", [], [], [])
    why = refusal(built, host(), gpus_of([target.kind])) if here else None
    if why is not None:
        raise UsageError(
            f"kernels are timed on the machine that they are for: {why}: pack the candidates with --offline DIR and time them there"
        )
