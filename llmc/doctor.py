"""What is installed here, which targets can be built and run, and the command for whatever is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from llmc.errors import MissingExtraError, UsageError
from llmc.paths import cache_root
from llmc.units import format_bytes
from llmc.version import __version__

RUNTIME_PACKAGES = ("apache-tvm-ffi", "numpy", "tokenizers", "jinja2", "rich", "filelock")


@dataclass
class Package:
    """An installed or missing package: ``version`` is None if it is missing; ``extra`` is the llmc extra that brings it."""

    name: str
    version: str | None
    extra: str | None


@dataclass
class TargetStatus:
    """Whether a target can be compiled for here, whether its artifacts run here, and why not."""

    target: str
    builds: bool
    runs: bool
    why: str


@dataclass
class Report:
    """``fixes``: one command for each thing that is missing."""

    llmc: str
    python: str
    system: str
    cpu: str
    features: list[str]
    cores: int
    threads: int
    memory_total: int
    memory_available: int
    cache: str
    cache_free: int
    packages: list[Package]
    targets: list[TargetStatus]
    fixes: list[str] = field(default_factory=list)


def examine() -> Report:
    """Look at this machine. Imports the compiler only if it is installed; reads no model."""
    from llmc import extras
    from llmc.runtime.host import default_threads, host, memory

    machine, ram = host(), memory()
    packages = [Package(name, _version(name), None) for name in RUNTIME_PACKAGES]
    packages += [Package(name, _version(name), extra) for extra, names in extras.PACKAGES.items() for name in names.values()]
    absent = [p for p in packages if p.version is None]
    fixes = [f"pip install {p.name}" for p in absent if p.extra is None]
    fixes += [f'pip install "llmc[{extra}]"' for extra in sorted({p.extra for p in absent if p.extra})]
    store = cache_root()
    report = Report(
        llmc=__version__,
        python=platform.python_version(),
        system=f"{machine.system} {platform.release()}",
        cpu=f"{machine.cpu_name} ({machine.machine})",
        features=sorted(machine.features or ()),
        cores=machine.cores,
        threads=default_threads(),
        memory_total=ram.total,
        memory_available=ram.available,
        cache=str(store),
        cache_free=shutil.disk_usage(_existing(store)).free,
        packages=packages,
        targets=[],
        fixes=fixes,
    )
    if not extras.missing("compile"):
        report.targets = _targets()
    return report


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """The nearest folder on the way up that exists, to ask for its free space."""
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())


def _targets() -> list[TargetStatus]:
    """Every target llmc names: whether its linker is here, and whether this processor has what its code uses."""
    from llmc import targets
    from llmc.runtime.artifact import DRIVEN, gpus_of
    from llmc.targets.here import refused

    found, gpus = [], gpus_of(DRIVEN)
    for spec in targets.known_specs():
        try:
            target = targets.parse(spec)
        except UsageError as error:  # a name that stands for a device of this machine, and there is none
            found.append(TargetStatus(spec, False, False, str(error)))
            continue
        try:
            targets.module_for(target).check_tools(target)
            missing = None
        except MissingExtraError as error:
            missing = str(error)
        reason = refused(target, gpus)
        name = spec if target.name == spec else f"{spec} = {target.name}"
        found.append(TargetStatus(name, missing is None, reason is None, missing or reason or ""))
    return found


def render(report: Report) -> str:
    """The report for people: what is here, then what is missing and the command for it."""
    lines = [
        f"llmc {report.llmc}, Python {report.python}, {report.system}",
        f"{report.cpu}, {report.cores} cores, {report.threads} threads by default",
        f"memory {format_bytes(report.memory_total)}, {format_bytes(report.memory_available)} available",
        f"cache {report.cache}, {format_bytes(report.cache_free)} free",
        "",
        "packages",
        *(f"  {p.name:<18} {p.version or 'missing'}" for p in report.packages),
        "",
        "targets",
    ]
    for t in report.targets:
        lines.append(
            f"  {t.target:<42} {'builds' if t.builds else 'does not build'}, {'runs here' if t.runs else 'does not run here'}"
        )
        if t.why:
            lines.append(f"    {t.why}")
    if not report.targets:
        lines.append("  none can be built: the compiler is not installed; artifacts for this machine run")
    lines += ["", *([f"to mend: {fix}" for fix in report.fixes] or ["nothing is missing"])]
    return "\n".join(lines)
