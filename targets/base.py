"""What a target is: everything the compiler needs to know about a machine, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    ``name`` is canonical and reproduces the target when parsed again (``"cpu:znver5"``); ``kind`` is cpu, cuda, rocm or metal.
    ``features`` are what the code will use and the loader must find on the machine (/proc/cpuinfo spelling for x86).
    ``vector_bits`` is the SIMD width; ``vector_registers`` how many; ``threads`` a default for planning, not a limit.
    """

    name: str
    kind: str
    triple: str
    mcpu: str
    features: tuple[str, ...]
    vector_bits: int
    vector_registers: int

    def lanes(self, dtype_bits: int = 32) -> int:
        """Elements of a dtype in one vector register."""
        return self.vector_bits // dtype_bits


class TargetModule(Protocol):
    """What each file in ``targets/`` offers for its kind."""

    KIND: str

    def parse(self, spec: str) -> Target:
        """The target that ``spec`` (``"cpu:x86-64-v3"``) names. Raises UsageError listing what there is."""

    def tvm_target(self, target: Target) -> Any:
        """The ``tvm.target.Target`` to generate code for."""

    def families(self, target: Target) -> Sequence[Any]:
        """The kernel families in order of preference."""

    def schedule(self, function: Any, target: Target) -> Any:
        """The PrimFunc, which TVM generated from Relax operators, scheduled for the target."""

    def export(self, executable: Any, target: Target, path: str) -> None:
        """Link a built ``relax.VMExecutable`` into one shared library at ``path``."""
