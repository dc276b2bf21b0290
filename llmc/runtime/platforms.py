"""What a machine's native libraries are called and where they are, by the triple that code was generated for."""

from __future__ import annotations

from dataclasses import dataclass

_BY_KIND = {"cuda": ("tvm_runtime_cuda",), "metal": ("tvm_runtime_metal",)}
"""Beside ``tvm_runtime``. HIP and OpenCL are driven by llmc itself (:mod:`llmc.runtime.gpu.device_code`)."""


@dataclass(frozen=True)
class Platform:
    """An operating system on a kind of processor. ``tags``: what wheels for it may be tagged with, the oldest system last."""

    name: str
    prefix: str
    suffix: str
    tags: tuple[str, ...]

    def libraries(self, kind: str) -> list[str]:
        """File names of TVM's libraries that a module for a target of ``kind`` needs at run time."""
        return [f"{self.prefix}{stem}{self.suffix}" for stem in ("tvm_runtime", *_BY_KIND.get(kind, ()))]

    @property
    def ffi_library(self) -> str:
        """The file name of tvm-ffi's library. Python packages bring it; a C program needs it beside TVM's."""
        return f"{self.prefix}tvm_ffi{self.suffix}"


def _linux(machine: str) -> Platform:
    tags = tuple(f"manylinux_2_{minor}_{machine}" for minor in (28, 27, 24, 17))
    return Platform(f"linux-{machine}", "lib", ".so", tags)


_MACOS = Platform("macos-arm64", "lib", ".dylib", tuple(f"macosx_{major}_0_arm64" for major in (14, 13, 12, 11)))
_WINDOWS = Platform("windows-x86_64", "", ".dll", ("win_amd64",))


def platform_of(triple: str) -> Platform | None:
    """The platform that ``triple`` names; None for one that TVM publishes no runtime libraries for (Android)."""
    machine, _, system = triple.partition("-")
    if "linux-gnu" in system and machine in ("x86_64", "aarch64"):
        return _linux(machine)
    if "macos" in system and machine in ("arm64", "aarch64"):
        return _MACOS
    if "windows" in system and machine == "x86_64":
        return _WINDOWS
    return None
