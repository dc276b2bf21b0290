"""What a target is: everything the compiler needs to know about a machine, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    ``name`` is canonical and reproduces the target when parsed again (``"cpu:znver5"``); ``kind`` is cpu, cuda, rocm or metal.
    ``features`` are what the code will use and the loader must find on the machine (/proc/cpuinfo spelling for x86); of a
    CUDA target, what its code holds besides (``"ptx"``).
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


@dataclass(frozen=True)
class MatrixInstruction:
    """A GPU's instruction d[m, n] += a[m, k] · b[n, k]ᵀ of one warp, with float32 sums, as data.

    ``form``: who knows where elements are.

    - ``"lanes"``: this data does. A lane holds ``width`` consecutive elements of k of one line of a and of one of b; lanes of one
      line hold the ones that follow, from the first on again where there are more lanes than elements. Lane l has column l % n of
      d, and its element e is in row ``strides[0]`` (l / n) + ``strides[1]`` e.
    - ``"ptx"``: ``ldmatrix`` loads what the instruction wants (PTX ISA, "Matrix fragments for mma.m16n8k16").
    - ``"simdgroup"``: the fragments are opaque, and loaded and stored by instructions (Metal Shading Language, 6.7).

    ``operands``: for each dtype of a matrix that it multiplies, the instruction's name, and the dtype that its operands have in
    shared memory: ``"int32"`` is two 16-bit elements.
    """

    form: str
    shape: tuple[int, int, int]
    operands: tuple[tuple[str, str, str], ...]
    width: int = 0
    strides: tuple[int, int] = (0, 0)

    def takes(self, dtype: str) -> bool:
        return any(dtype == known for known, _, _ in self.operands)

    def name(self, dtype: str) -> str:
        return next(name for known, name, _ in self.operands if known == dtype)

    def held_as(self, dtype: str) -> str:
        return next(held for known, _, held in self.operands if known == dtype)


@dataclass(frozen=True)
class GpuTarget(Target):
    """A GPU and the host that drives it: ``triple`` is the host's, ``mcpu`` the GPU architecture (``"sm_90a"``).

    ``vector_bits`` is the widest load of one thread, ``vector_registers`` the 32-bit registers a thread may have.
    ``shared_memory``: bytes of it that one thread block may ask for, ``shared_arrays``: of them, those that arrays of fixed size
    may take together. ``registers``: 32-bit registers of one multiprocessor.
    ``multiprocessors``: how many a typical GPU has, for planning. ``max_lanes``: most elements of one vector load.
    ``lane_exchange``: whether the threads of a warp can read each other's registers. ``matrix``: its matrix instruction, if any.
    """

    warp_size: int = 32
    max_threads: int = 1024
    shared_memory: int = 48 << 10
    shared_arrays: int = 48 << 10
    registers: int = 65536
    multiprocessors: int = 108
    max_lanes: int = 8
    lane_exchange: bool = True
    matrix: MatrixInstruction | None = None


def folder_name(target: Target) -> str:
    """The target's name as a folder may have it: ``"cuda-sm_90a"``."""
    return target.name.replace(":", "-")


class TargetModule(Protocol):
    """What each file in ``targets/`` offers for its kind."""

    KIND: str

    def parse(self, spec: str) -> Target:
        """The target that ``spec`` (``"cpu:x86-64-v3"``) names. Raises UsageError listing what there is."""

    def known_specs(self) -> list[str]:
        """Target names a user may start from."""

    def check_tools(self, target: Target) -> None:
        """Raise MissingExtraError with the command to run if a tool that building for ``target`` takes is not here."""

    def tvm_target(self, target: Target) -> Any:
        """The ``tvm.target.Target`` to generate code for."""

    def families(self, target: Target) -> Sequence[Any]:
        """The kernel families in order of preference."""

    def layouts(self, target: Target) -> Sequence[Any]:
        """The layouts of quantized weights in order of preference (:mod:`llmc.schedules.layouts`). A module without this function
        has none."""

    def schedule(self, function: Any, target: Target) -> Any:
        """The PrimFunc, which TVM generated from Relax operators, scheduled for the target."""

    def compute_dtype(self, storage: str) -> str:
        """The dtype of activations for matrices stored as ``storage``; sums are float32 whatever it is."""

    def build(self, module: Any, target: Target) -> Any:
        """A lowered IRModule as a ``relax.VMExecutable``. Raises MissingExtraError without the tools that takes."""

    def build_kernels(self, module: Any, target: Target) -> Any:
        """An IRModule of PrimFuncs alone as a loaded module, by the lowering that :meth:`build` uses."""

    def export(self, executable: Any, target: Target, path: str) -> None:
        """Link a built ``relax.VMExecutable`` into one shared library at ``path``."""
