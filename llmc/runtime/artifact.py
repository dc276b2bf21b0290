"""Open an artifact: check it against this llmc, this TVM and this machine before anything is loaded.

Every refusal says what was built, what was found, and the command that mends it.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmc import manifest
from llmc.errors import ArtifactError
from llmc.manifest import Manifest, Variant
from llmc.runtime import tile_registers
from llmc.runtime.device import (
    PTX,
    AmdDevice,
    CudaDevice,
    MetalDevice,
    amd_devices,
    cuda_devices,
    metal_devices,
    opencl_devices,
    runs_from_ptx,
    runs_on,
)
from llmc.runtime.host import Host, host
from llmc.runtime.library import LIBRARY_NAME, installed_version
from llmc.version import __version__

_log = logging.getLogger("llmc")
_SYSTEM_WORDS = {"linux": ("linux",), "darwin": ("darwin", "macos"), "windows": ("windows",)}


@dataclass(frozen=True)
class Artifact:
    """An artifact this machine can run: its folder, what its manifest says, the variant for this machine, and why that one."""

    folder: Path
    manifest: Manifest
    variant: Variant
    why: str = ""


class Gpu(Protocol):
    """A device that the machine has beside its processor. ``kind``: of target."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...


DRIVEN = ("cuda", "rocm", "metal", "opencl")
"""The kinds of GPU target that this runtime drives."""


def gpus_of(kinds: Iterable[str]) -> list[Gpu]:
    """The GPUs of this machine that targets of ``kinds`` may run on. Asks no driver that none of them has."""
    find: dict[str, Callable[[], Sequence[Gpu]]] = {
        "cuda": cuda_devices,
        "rocm": amd_devices,
        "metal": metal_devices,
        "opencl": opencl_devices,
    }
    return [gpu for kind in DRIVEN if kind in kinds for gpu in find[kind]()]


def _release(version: str, parts: int) -> list[str]:
    """The first ``parts`` numbers of a version: ``0.27.0.post1`` -> ``["0", "27", "0"]``."""
    return version.split("+")[0].split(".")[:parts]


def _recompile(m: Manifest, where: Path) -> str:
    """The command that makes the artifact anew: for its targets, stored as it is, with its limits. What is as a compile has it
    unless asked is left out; a calibration text of the user's is not known."""
    asked: list[tuple[str, object]] = [("target", v.target) for v in m.variants]
    same = {"dtype": None, "kv_dtype": m.options.get("dtype"), "quant": "native", "method": None, "target_bpw": None}
    asked += [(name, m.options[name]) for name, usual in same.items() if m.options.get(name, usual) != usual]
    asked += [("keep", text) for text in m.options.get("keep", ())]
    if m.model.context != m.model.trained_context:
        asked.append(("context", m.model.context))
    asked.append(("max_batch", m.limits.max_batch))
    words = [m.model.source, "-o", str(where), "--force"]
    for name, value in asked:
        words += [f"--{name.replace('_', '-')}", str(value)]
    return f"`llmc compile {shlex.join(words)}`"


def check_versions(m: Manifest, where: Path) -> None:
    """Raise ArtifactError unless this llmc (major.minor) and this TVM (release) are those that built the artifact."""
    if _release(m.llmc, 2) != _release(__version__, 2):
        raise ArtifactError(
            f"the artifact {where} was built by llmc {m.llmc} and this is llmc {__version__}: "
            f"recompile it with {_recompile(m, where)}, or run `pip install llmc=={m.llmc}`"
        )
    if (where / "runtime" / LIBRARY_NAME).is_file():
        return  # it brought the library it was built for
    found = installed_version()
    if found is not None and _release(m.tvm, 3) != _release(found, 3):
        raise ArtifactError(
            f"the artifact {where} was built with TVM {m.tvm} and TVM {found} is installed: "
            f"recompile it with {_recompile(m, where)}, or run `pip install apache-tvm=={m.tvm}`"
        )


def refusal(variant: Variant, machine: Host, gpus: Sequence[Gpu] = ()) -> str | None:
    """Why ``machine`` with its ``gpus`` cannot run ``variant``, as one clause; None if it can."""
    if variant.kind not in ("cpu", *DRIVEN):
        return (
            f"{variant.target} needs a {variant.kind} device, and this runtime drives CPUs, NVIDIA, AMD, Apple and OpenCL devices"
        )
    arch = variant.triple.split("-")[0]
    arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(arch, arch)
    words = _SYSTEM_WORDS.get(machine.system, (machine.system,))
    if arch != machine.machine or not any(word in variant.triple for word in words):
        return f"{variant.target} is for {variant.triple}, and this machine is {machine.machine} {machine.system}"
    if variant.kind != "cpu":
        return _gpu_refusal(variant, [gpu for gpu in gpus if gpu.kind == variant.kind])
    absent = [] if machine.features is None else [f for f in variant.features if f not in machine.features]
    if absent:
        withheld = machine.withheld if set(absent) <= tile_registers.FEATURES else ""
        why = f": {withheld}" if withheld else f", which this {machine.cpu_name} does not have"
        return f"{variant.target} needs the CPU features {', '.join(absent)}{why}"
    return None


_NO_GPU = {
    "cuda": "needs an NVIDIA GPU, and no NVIDIA driver answers on this machine",
    "rocm": "needs an AMD GPU, and the amdgpu driver lists none on this machine",
    "metal": "needs a Mac with an Apple processor, and this machine is none",
    "opencl": "needs an OpenCL device with shared virtual memory, and there is none on this machine",
}


def _gpu_refusal(variant: Variant, gpus: Sequence[Any]) -> str | None:
    if not gpus:
        return f"{variant.target} {_NO_GPU[variant.kind]}"
    gpu = gpus[0]  # models run on the first one
    fits = {
        "cuda": lambda: _cuda_code(variant, gpu) is not None,
        "rocm": lambda: variant.mcpu == gpu.arch,
        "metal": lambda: variant.mcpu <= gpu.arch,  # a family has all that those before it have
        "opencl": lambda: True,
    }
    if fits[variant.kind]():
        return None
    return f"{variant.target} is machine code for {variant.mcpu}, and this machine's {gpu.name} is {gpu.arch}"


def _cuda_code(variant: Variant, gpu: CudaDevice) -> str | None:
    """What of a CUDA variant the GPU would run: ``"machine code"``, ``"PTX"``, or nothing."""
    if runs_on(variant.mcpu, gpu.capability):
        return "machine code"
    return "PTX" if PTX in variant.features and runs_from_ptx(variant.mcpu, gpu.capability) else None


def score(variant: Variant, gpus: Sequence[Any] = ()) -> tuple[float, int, str, int]:
    """How well a variant that runs here suits the machine, the more the better: a GPU by its own code before one by OpenCL, before
    the processor, before OpenCL on the processor; then machine code before PTX; then the newer GPU architecture; then more
    features of the processor."""
    if variant.kind == "cpu":
        return 1, 0, "", len(variant.features)
    if variant.kind == "opencl":
        return 2 if any(gpu.kind == "opencl" and gpu.gpu for gpu in gpus) else 0, 0, "", 0
    number = int("".join(filter(str.isdigit, variant.mcpu)))
    return 3 - _translated(variant, gpus) / 2, number, variant.mcpu, 0


def _translated(variant: Variant, gpus: Sequence[Any]) -> bool:
    """Whether a variant that runs here would run from PTX."""
    mine = [gpu for gpu in gpus if gpu.kind == variant.kind]
    return variant.kind == "cuda" and bool(mine) and _cuda_code(variant, mine[0]) == "PTX"


def choose_variant(m: Manifest, where: Path, machine: Host, gpus: Sequence[Gpu] = ()) -> tuple[Variant, str]:
    """The variant with the best score of those that run here, and why that one, as a clause.

    Raises ArtifactError saying why each one cannot run here.
    """
    if not m.variants:
        raise ArtifactError(f"the artifact {where} holds no compiled module: recompile it with {_recompile(m, where)}")
    reasons = {v.name: refusal(v, machine, gpus) for v in m.variants}
    usable = sorted((v for v in m.variants if reasons[v.name] is None), key=lambda v: score(v, gpus), reverse=True)
    if not usable:
        target = next(filter(None, map(_target_for, gpus)), "cpu")
        why = "; ".join(str(reason) for reason in reasons.values())
        raise ArtifactError(f"no variant of the artifact {where} runs on this machine: {why}: add one with `{_add(where, target)}`")
    best, *others = usable
    device = next((gpu.name for gpu in gpus if gpu.kind == best.kind), machine.cpu_name)
    rest = [f"rather than {v.target}, which would run too" for v in others] + [str(r) for r in reasons.values() if r is not None]
    if _translated(best, gpus):
        rest.insert(0, f"from PTX, which the driver translates for {device}")
    return best, "; ".join([f"{best.target} suits {device} best" if rest else f"{best.target} is the only variant", *rest])


def _target_for(gpu: Gpu) -> str | None:
    """The target to compile for so that it runs on ``gpu``; None for one that has none of its own."""
    if isinstance(gpu, CudaDevice):
        return f"{gpu.kind}:{gpu.compiled_for}" if gpu.compiled_for else None
    return f"{gpu.kind}:{gpu.arch}" if isinstance(gpu, AmdDevice | MetalDevice) else None


def _add(where: Path, target: str) -> str:
    return f"llmc add {where} --target {target}"


def check_sizes(m: Manifest, where: Path) -> None:
    """Raise ArtifactError naming the first file that is missing or not of the size the manifest gives. Reads no file."""
    for name, info in m.files.items():
        path = where / name
        found = path.stat().st_size if path.is_file() else None
        if found != info.bytes:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ArtifactError(
                f"the artifact {where} is damaged: {name} {what}, and the manifest says {info.bytes} bytes: "
                f"copy it again, or recompile it with {_recompile(m, where)}"
            )


def open_artifact(folder: str | Path) -> Artifact:
    """The artifact in ``folder``, checked as far as is possible without reading weights.

    Raises ArtifactError: no artifact there, built by another version, nothing in it for this machine, or damaged.
    """
    where = Path(folder)
    m = manifest.read(where)
    check_versions(m, where)
    variant, why = choose_variant(m, where, host(), gpus_of({v.kind for v in m.variants}))
    check_sizes(m, where)
    _log.info("%s", why)
    return Artifact(where, m, variant, why)
