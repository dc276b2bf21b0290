"""Whether kernels for a target can be timed: known before the model is read."""

from __future__ import annotations

from llmc.errors import UsageError
from llmc.targets.base import Target
from llmc.targets.here import refused

KINDS = ("cpu", "cuda")
"""Of the targets whose kernels :mod:`llmc.tune.devices` can time."""


def check_target(target: Target, here: bool) -> None:
    """Raise UsageError unless kernels for ``target`` can be timed, and if ``here``, on this machine."""
    if target.kind not in KINDS:
        raise UsageError(f"llmc tune times kernels on processors and NVIDIA GPUs, and {target.name} is neither")
    if here and (why := refused(target)) is not None:
        raise UsageError(
            f"kernels are timed on the machine that they are for: {why}: pack the candidates with --offline DIR and time them there"
        )
