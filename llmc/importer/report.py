"""What cannot be imported, collected and told all at once: each operator with its shapes, dtypes and module path."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from llmc.errors import UnsupportedError


class Refused(Exception):
    """A converter cannot translate this node; the message says what about it."""


@dataclass(frozen=True)
class Problem:
    """One node that cannot be imported."""

    op: str
    operands: str
    module: str
    why: str

    @staticmethod
    def of(node: torch.fx.Node, why: str) -> Problem:
        return Problem(str(node.target), _operands(node), module_path(node), why)


def module_path(node: torch.fx.Node) -> str:
    """The path of the innermost module a node was traced in: ``model.layers.3.mlp``."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "the model"
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self'].").removeprefix("model.") or "the model"


def _operands(node: torch.fx.Node) -> str:
    parts = []
    for argument in node.all_input_nodes:
        value = argument.meta.get("val")
        if isinstance(value, torch.Tensor):
            parts.append(f"{str(value.dtype).removeprefix('torch.')}{[str(s) for s in value.shape]}".replace("'", ""))
    return ", ".join(parts)


def raise_unsupported(model: str, problems: list[Problem]) -> None:
    """Raise one UnsupportedError that lists every problem; layers that repeat one are counted, not listed."""
    if not problems:
        return
    lines = []
    groups: Counter[tuple[str, str, str]] = Counter((p.op, p.operands, p.why) for p in problems)
    for (op, operands, why), count in groups.items():
        first = next(p for p in problems if (p.op, p.operands, p.why) == (op, operands, why))
        times = f" and {count - 1} more places" if count > 1 else ""
        lines.append(f"  {op}({operands}) in {first.module}{times}: {why}")
    raise UnsupportedError(
        f"{model} holds {len(lines)} thing{'s' if len(lines) > 1 else ''} that llmc cannot compile:\n" + "\n".join(lines)
    )
