"""Decisions for a whole model that no rule makes well: how many positions a KV page has, what is fused, how work is dealt out.

Each costs or gains by the model, the batch and the machine: a wide page is read in longer runs and wasted by short sequences; a
fused kernel saves a round through memory and may keep a plain one from using all threads. ``llmc tune`` measures them
(:mod:`llmc.tune.whole`) and records them as if a model were a kernel of this family: same files, same look-up, same nearest
neighbour.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from llmc.schedules.lookup import Records
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

NAME = "model"
OP = "llmc.model"
UNFUSABLE = ("gated", "append", "attend", "norm", "step", "early")
"""Choices to fuse or not."""


@dataclass(frozen=True)
class Choices:
    """``page_size``: positions of a KV page. Fused into one kernel: ``gated``, both halves of a gated feed-forward layer with its
    activation (:mod:`~llmc.passes.fuse_gated`); ``append``, rotation and append (:mod:`~llmc.passes.fuse_append`); ``attend``, both
    with attention in decode steps (:mod:`~llmc.passes.fuse_attend`); ``norm``, a
    norm and the linear layers behind it (:mod:`~llmc.passes.fold_gain`, :mod:`~llmc.passes.fold_norm`); ``step``, all kernels of a
    step on a CPU (:mod:`~llmc.passes.one_region`). ``early``: a kernel starts while the one before it ends, on NVIDIA GPUs that can
    (:mod:`llmc.targets.dependent_launch`). ``chunks``: pieces of a kernel for each thread of a step on a CPU; more keep threads
    busy that are held up, and cost an atomic addition each."""

    page_size: int = 16
    gated: bool = True
    append: bool = True
    attend: bool = True
    norm: bool = True
    step: bool = True
    early: bool = True
    chunks: int = 6

    @property
    def unfused(self) -> frozenset[str]:
        """What stays apart: in kernels of its own, or after the end of the kernel before."""
        return frozenset(axis for axis in UNFUSABLE if not getattr(self, axis))


DEFAULT = Choices()


def model_call(hidden: int, vocab: int, layers: int, storage: str) -> KernelCall:
    """What records of a model are kept under: models of one shape and storage (``"int4_g32"``, ``"bfloat16"``) are alike."""
    x, head = TensorSpec(("n", hidden), "float32"), TensorSpec((vocab, hidden), storage)
    return KernelCall(OP, (x, head), TensorSpec(("n", vocab), "float32"), (("layers", layers),), "decode")


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    """The axes of :class:`Choices`, defaults first; those that mean nothing to the target have one value."""
    step, chunks = ([True, False], [6, 3, 12]) if target.kind == "cpu" else ([True], [6])
    cuda = [True, False] if target.kind == "cuda" else [True]
    return {
        "page_size": [16, 32, 64], "gated": [True, False], "append": [True, False], "attend": cuda, "norm": cuda, "step": step,
        "early": cuda, "chunks": chunks,
    }  # fmt: skip


def find(records: Records, call: KernelCall, target: Target) -> tuple[Choices, str]:
    """The choices that records give a model, and where they are from: ``"default"`` without any."""
    found = records.lookup(sys.modules[__name__], call, target)
    return (DEFAULT, "default") if found is None else (Choices(**found.config), f"{found.origin}: {found.why}")
