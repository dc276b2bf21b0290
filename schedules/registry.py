"""Which kernel family takes a call: the first of the target's list that matches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.errors import UnsupportedError
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target


def signature(call: KernelCall) -> str:
    """Operands and attributes for reports: ``(float32[n,576], float32[960,576]) bias=1``. Attributes that ask for nothing (zero,
    none, no window) are left out."""
    attrs = ", ".join(f"{n}={v:.6g}" if isinstance(v, float) else f"{n}={v}" for n, v in call.attrs if v not in (0, -1, "none"))
    return f"({', '.join(_tensor(a) for a in call.args)}) {attrs}".rstrip()


def takes(call: KernelCall, target: Target, families: Sequence[Any]) -> bool:
    """Whether :func:`choose` finds a family for ``call``."""
    return any(call.op == family.OP and family.matches(call, target) is not None for family in families)


def choose(call: KernelCall, target: Target, families: Sequence[Any]) -> tuple[Any, str]:
    """The family for ``call`` and why it was taken. Raises UnsupportedError naming the op and the shapes if there is none."""
    candidates = [family for family in families if call.op == family.OP]
    for family in candidates:
        why = family.matches(call, target)
        if why is not None:
            return family, why
    tried = (
        f"of its families {', '.join(f.NAME for f in candidates)} none takes it" if candidates else "it has no family for this op"
    )
    raise UnsupportedError(
        f"target {target.name} has no kernel for {call.op}{signature(call)} in the {call.phase} phase ({tried}): "
        "use another data type or target, or report the shape"
    )


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.dtype}[{','.join(str(d) for d in spec.shape)}]"
