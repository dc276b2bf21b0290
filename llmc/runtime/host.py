"""What this machine is: its processor's name and features, its cores, its memory. Read from the operating system."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llmc.runtime import tile_registers

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_SYSTEMS = {"linux": "linux", "darwin": "darwin", "win32": "windows"}


@dataclass(frozen=True)
class Host:
    """This machine.

    ``machine`` is LLVM's name of the architecture (x86_64, aarch64), ``system`` the operating system's (linux, darwin, windows).
    ``features``, those that a program may use, are in /proc/cpuinfo spelling, None where the system does not tell; ``withheld``:
    why some that the processor has are not among them. ``cpus`` are the logical processors this process may use; ``cores`` counts
    the physical cores among them.
    """

    machine: str
    system: str
    cpu_name: str
    features: frozenset[str] | None
    cpus: tuple[int, ...]
    cores: int
    withheld: str = ""


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """``/proc/cpuinfo`` as one dictionary per logical processor."""
    blocks = []
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        blocks.append({key.strip(): value.strip() for key, _, value in pairs})
    return blocks


def allowed_cpus() -> tuple[int, ...]:
    """The logical processors this process may run on."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def describe(cpuinfo: str, machine: str, system: str, cpus: tuple[int, ...]) -> Host:
    """The host that ``cpuinfo`` (the text of /proc/cpuinfo, empty where there is none) and the process's ``cpus`` make."""
    blocks = [b for b in parse_cpuinfo(cpuinfo) if "processor" in b]
    first = blocks[0] if blocks else {}
    flags = first.get("flags", first.get("Features"))
    mine = [b for b in blocks if int(b["processor"]) in cpus]
    # hyper-threads share a (socket, core) pair; ARM lists no cores and has no hyper-threads
    cores = {(b.get("physical id"), b.get("core id", b["processor"])) for b in mine}
    return Host(
        machine=_MACHINES.get(machine.lower(), machine.lower()),
        system=system,
        cpu_name=first.get("model name") or platform.processor() or machine,
        features=None if flags is None else frozenset(flags.split()),
        cpus=cpus,
        cores=len(cores) or len(cpus),
    )


@cache
def host() -> Host:
    """This machine, read once."""
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""
    here = describe(text, platform.machine(), _SYSTEMS.get(sys.platform, sys.platform), allowed_cpus())
    usable = None if here.features is None else tile_registers.usable(here.features)
    return here if usable == here.features else replace(here, features=usable, withheld=tile_registers.refusal() or "")


def default_threads() -> int:
    """Threads to compute with unless told otherwise: ``TVM_NUM_THREADS`` if it is set, else one for each physical core."""
    wish = os.environ.get("TVM_NUM_THREADS", "")
    count = int(wish) if wish.isdecimal() and int(wish) > 0 else host().cores
    return min(count, len(host().cpus))


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: all of it, and what can be taken now without swapping."""

    total: int
    available: int


def memory() -> Memory:
    """This machine's memory now."""
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
        total = int(fields["MemTotal"].split()[0]) * 1024
        return Memory(total, int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else total // 2)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
    return Memory(total, total // 2)
