"""CPUs through LLVM: this host, an x86-64 level, a named micro-architecture, or another machine by cross-compilation.

====================================== =====================================================================================
spec                                   machine
====================================== =====================================================================================
``cpu``                                this host; the name becomes ``cpu:<llvm cpu>``, with ``+no<feature>`` for what a
                                       hypervisor hides
``cpu:x86-64``, ``-v2``, ``-v3``, ...  the levels of the x86-64 psABI
``cpu:<llvm cpu>``                     ``skylake-avx512``, ``znver4``, ``neoverse-n1``: validated against LLVM's lists
``cpu:aarch64+neon+dotprod+i8mm``      64-bit Arm with the named extensions
``cpu:...@SYSTEM``                     any of these under ``macos``, ``windows`` or ``android`` instead of Linux:
                                       ``cpu:apple-m1@macos``, ``cpu:x86-64-v3@windows``, ``cpu:aarch64+dotprod@android``
====================================== =====================================================================================
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import relax
from tvm.target import codegen

from llmc.errors import UsageError
from llmc.runtime import tile_registers
from llmc.targets.base import Target
from llmc.targets.cpu_pipeline import PIPELINE
from llmc.targets.link import linker

KIND = "cpu"
X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"
SYSTEMS = {
    "linux": (X86, ARM),
    "macos": ("x86_64-apple-macos13.0", "arm64-apple-macos13.0"),
    "windows": ("x86_64-pc-windows-gnu", "aarch64-pc-windows-gnu"),
    "android": ("x86_64-linux-android", "aarch64-linux-android"),
}
"""The triples of x86-64 and 64-bit Arm by operating system."""

LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
CPUINFO = Path("/proc/cpuinfo")

X86_FEATURES = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt", "cx16": "cx16",
    "sahf": "lahf_lm", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2",
    "lzcnt": "abm", "movbe": "movbe", "adx": "adx", "gfni": "gfni", "fma4": "fma4", "xop": "xop", "tbm": "tbm",
    "avxvnni": "avx_vnni", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2",
    "avx512bitalg": "avx512_bitalg", "amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
    "avx512vpopcntdq": "avx512_vpopcntdq", "avx512vp2intersect": "avx512_vp2intersect",
}  # fmt: skip
"""What LLVM may use of its own accord: its name for the feature, and the name in /proc/cpuinfo."""

ARM_FEATURES = {
    "neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm", "bf16": "bf16", "fullfp16": "asimdhp", "lse": "atomics",
    "sve": "sve", "sve2": "sve2",
}  # fmt: skip


def known_specs() -> list[str]:
    arm = [f"cpu:aarch64+{extension}" for extension in ("neon", "dotprod", "dotprod+i8mm")]
    elsewhere = ["cpu:apple-m1@macos", "cpu:x86-64-v3@windows", "cpu:aarch64+dotprod@android"]
    return ["cpu", *(f"cpu:{level}" for level in LEVELS), *arm, *elsewhere]


def parse(spec: str) -> Target:
    """The target that ``spec`` names. Raises UsageError for a processor, a feature or an operating system that is unknown."""
    name, at, system = spec.partition(":")[2].partition("@")
    if not name and not at:
        return _host()
    system = system if at else "linux"
    if system not in SYSTEMS:
        near = difflib.get_close_matches(system, SYSTEMS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown operating system {system!r} in target {spec!r}: there is {', '.join(SYSTEMS)}{hint}")
    mcpu, *extras = name.split("+")
    x86, arm = SYSTEMS[system]
    suffix = "" if system == "linux" else f"@{system}"
    if mcpu == "aarch64":
        return _target(arm, "generic", extras, mcpu, suffix)
    for triple, known in ((x86, X86), (arm, ARM)):
        if mcpu in _cpus(known):
            return _target(triple, mcpu, extras, suffix=suffix)
    names = sorted({*LEVELS, "aarch64", *_cpus(X86), *_cpus(ARM)})
    near = difflib.get_close_matches(mcpu, names, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(f'cpu:{n}' for n in near)}" if near else ""
    raise UsageError(
        f"unknown processor {mcpu!r} in target {spec!r}: there is {', '.join(known_specs())} and every name LLVM knows{hint}"
    )


def check_tools(target: Target) -> None:
    linker(target)


def tvm_target(target: Target) -> tvm.target.Target:
    """LLVM with the target's triple, processor and extensions."""
    _, *extras = target.name.partition(":")[2].partition("@")[0].split("+")
    config: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple, "mcpu": target.mcpu}
    attributes = [f"-{e[2:]}" if e.startswith("no") else f"+{e}" for e in extras if e not in ("", "neon")]
    if attributes:
        config["mattr"] = attributes
    return tvm.target.Target(config)


def families(target: Target) -> Sequence[Any]:
    """The CPU kernel families, in order of preference."""
    from llmc.schedules.cpu import FAMILIES

    return FAMILIES


def layouts(target: Target) -> Sequence[Any]:
    """The layouts of quantized weights, in order of preference."""
    from llmc.schedules.cpu import LAYOUTS

    return LAYOUTS


def schedule(function: Any, target: Target) -> Any:
    """Schedule a PrimFunc that Relax legalised and fused; see :mod:`llmc.schedules.cpu.elementwise`."""
    from llmc.schedules.cpu import elementwise

    return elementwise.schedule(function, target)


def compute_dtype(storage: str) -> str:
    """Activations are float32 whatever matrices are stored as: a CPU widens narrow weights as it loads them."""
    return "float32"


def build(module: tvm.IRModule, target: Target) -> Any:
    """The executable, machine code included."""
    with tvm_target(target) as tvm_t:
        return relax.build(module, tvm_t, relax_pipeline=None, tir_pipeline=PIPELINE)


def build_kernels(module: tvm.IRModule, target: Target) -> Any:
    """Kernels alone as a loaded module: the machine code they have in :func:`build`."""
    return tvm.tirx.build(module, target=tvm_target(target), pipeline=PIPELINE)


def export(executable: Any, target: Target, path: str) -> None:
    """Link a built module into one shared library. Raises MissingExtraError without a linker for the target."""
    executable.export_library(path, fcompile=linker(target))


_ALIASES = {"apple-m1": "apple-a14", "apple-m2": "apple-a15", "apple-m3": "apple-a16"}
"""Names that LLVM takes and does not list, with the processors whose cores those have."""


def _cpus(triple: str) -> set[str]:
    listed = {str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm", "mtriple": triple}))}
    return listed | {alias for alias, name in _ALIASES.items() if name in listed}


def _features(triple: str, mcpu: str) -> set[str]:
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu})
    return {str(name) for name in codegen.llvm_get_cpu_features(target)}


def _target(triple: str, mcpu: str, extras: Sequence[str], label: str = "", suffix: str = "") -> Target:
    table = X86_FEATURES if triple.startswith("x86_64") else ARM_FEATURES
    has = _features(triple, mcpu) & set(table)
    for extra in extras:
        feature = extra.removeprefix("no")
        if feature not in table:
            near = difflib.get_close_matches(feature, table, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown feature {feature!r} for cpu:{label or mcpu}: there is {', '.join(table)}{hint}")
        has = has - {feature} if extra.startswith("no") else has | {feature}
    name = "+".join([f"cpu:{label or mcpu}", *sorted(set(extras) | ({"neon"} if label == "aarch64" else set()))]) + suffix
    if triple.startswith("x86_64"):
        wide = {"avx512f", "avx512bw", "avx512vl"} <= has
        bits, registers = (512, 32) if wide else (256, 16) if "avx2" in has else (128, 16)
    else:
        bits, registers = 128, 32
    return Target(name, KIND, triple, mcpu, tuple(sorted(table[f] for f in has)), bits, registers)


def _host() -> Target:
    mcpu = str(codegen.llvm_get_system_cpu())
    machine = platform.machine().lower()
    triple = ARM if machine in ("aarch64", "arm64") else X86
    if platform.system() != "Linux":
        triple = str(codegen.llvm_get_system_triple())
    table = ARM_FEATURES if triple == ARM else X86_FEATURES
    present = tile_registers.usable(frozenset(_cpuinfo()))
    hidden = sorted(f for f in _features(triple, mcpu) & set(table) if present and table[f] not in present)
    return _target(triple, mcpu, [f"no{f}" for f in hidden])


def _cpuinfo() -> set[str]:
    """The features the kernel reports for this machine; empty where it reports none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
