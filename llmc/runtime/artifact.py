"""Open an artifact: check it against this llmc, this TVM and this machine before anything is loaded.

Every refusal says what was built, what was found, and the command that mends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc import manifest
from llmc.errors import ArtifactError
from llmc.manifest import Manifest, Variant
from llmc.runtime.device import CudaDevice, cuda_devices, runs_on
from llmc.runtime.host import Host, host
from llmc.runtime.library import LIBRARY_NAME, installed_version
from llmc.version import __version__

_SYSTEM_WORDS = {"linux": ("linux",), "darwin": ("darwin", "macos"), "windows": ("windows",)}


@dataclass(frozen=True)
class Artifact:
    """An artifact this machine can run: its folder, what its manifest says, and the variant chosen for this machine."""

    folder: Path
    manifest: Manifest
    variant: Variant


def _release(version: str, parts: int) -> list[str]:
    """The first ``parts`` numbers of a version: ``0.27.0.post1`` -> ``["0", "27", "0"]``."""
    return version.split("+")[0].split(".")[:parts]


def _recompile(m: Manifest, target: str = "cpu") -> str:
    return f"`llmc compile {m.model.source} --target {target}`"


def check_versions(m: Manifest, where: Path) -> None:
    """Raise ArtifactError unless this llmc (major.minor) and this TVM (release) are those that built the artifact."""
    if _release(m.llmc, 2) != _release(__version__, 2):
        raise ArtifactError(
            f"the artifact {where} was built by llmc {m.llmc} and this is llmc {__version__}: recompile it with {_recompile(m)}, "
            f"or run `pip install llmc=={m.llmc}`"
        )
    if (where / "runtime" / LIBRARY_NAME).is_file():
        return  # it brought the library it was built for
    found = installed_version()
    if found is not None and _release(m.tvm, 3) != _release(found, 3):
        raise ArtifactError(
            f"the artifact {where} was built with TVM {m.tvm} and TVM {found} is installed: recompile it with {_recompile(m)}, "
            f"or run `pip install apache-tvm=={m.tvm}`"
        )


def refusal(variant: Variant, machine: Host, gpus: Sequence[CudaDevice] = ()) -> str | None:
    """Why ``machine`` with its ``gpus`` cannot run ``variant``, as one clause; None if it can."""
    if variant.kind not in ("cpu", "cuda"):
        return f"{variant.target} needs a {variant.kind} device, and this runtime drives CPUs and NVIDIA GPUs"
    arch = variant.triple.split("-")[0]
    arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(arch, arch)
    words = _SYSTEM_WORDS.get(machine.system, (machine.system,))
    if arch != machine.machine or not any(word in variant.triple for word in words):
        return f"{variant.target} is for {variant.triple}, and this machine is {machine.machine} {machine.system}"
    if variant.kind == "cuda":
        return _gpu_refusal(variant, gpus)
    absent = [] if machine.features is None else [f for f in variant.features if f not in machine.features]
    if absent:
        return f"{variant.target} needs the CPU features {', '.join(absent)}, which this {machine.cpu_name} does not have"
    return None


def _gpu_refusal(variant: Variant, gpus: Sequence[CudaDevice]) -> str | None:
    if not gpus:
        return f"{variant.target} needs an NVIDIA GPU, and no NVIDIA driver answers on this machine"
    gpu = gpus[0]  # models run on the first one
    if runs_on(variant.mcpu, gpu.capability):
        return None
    return f"{variant.target} is machine code for {variant.mcpu}, and this machine's {gpu.name} is {gpu.arch}"


def choose_variant(m: Manifest, where: Path, machine: Host, gpus: Sequence[CudaDevice] = ()) -> Variant:
    """The variant for the GPU, or the one that uses the most features of the processor.

    Raises ArtifactError saying why each one cannot run here.
    """
    if not m.variants:
        raise ArtifactError(f"the artifact {where} holds no compiled module: recompile it with {_recompile(m)}")
    reasons = {v.name: refusal(v, machine, gpus) for v in m.variants}
    usable = [v for v in m.variants if reasons[v.name] is None]
    if not usable:
        target = f"cuda:{gpus[0].arch}" if gpus else "cpu"
        why = "; ".join(str(reason) for reason in reasons.values())
        raise ArtifactError(f"no variant of the artifact {where} runs on this machine: {why}: add one with {_recompile(m, target)}")
    return max(usable, key=lambda v: (v.kind == "cuda", v.mcpu if v.kind == "cuda" else "", len(v.features)))


def check_sizes(m: Manifest, where: Path) -> None:
    """Raise ArtifactError naming the first file that is missing or not of the size the manifest gives. Reads no file."""
    for name, info in m.files.items():
        path = where / name
        found = path.stat().st_size if path.is_file() else None
        if found != info.bytes:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ArtifactError(
                f"the artifact {where} is damaged: {name} {what}, and the manifest says {info.bytes} bytes: "
                f"copy it again, or recompile it with {_recompile(m)}"
            )


def open_artifact(folder: str | Path) -> Artifact:
    """The artifact in ``folder``, checked as far as is possible without reading weights.

    Raises ArtifactError: no artifact there, built by another version, nothing in it for this machine, or damaged.
    """
    where = Path(folder)
    m = manifest.read(where)
    check_versions(m, where)
    gpus = cuda_devices() if any(v.kind == "cuda" for v in m.variants) else []
    variant = choose_variant(m, where, host(), gpus)
    check_sizes(m, where)
    return Artifact(where, m, variant)
