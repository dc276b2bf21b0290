"""TVM's runtime libraries for any machine: the installed ones for this kind, else out of the wheels that pip fetches."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from llmc.errors import MissingExtraError, OutputError
from llmc.paths import cache_root
from llmc.runtime.host import host
from llmc.runtime.platforms import Platform, platform_of

_PACKAGES = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
_BUNDLED = "*140*.dll"
"""Microsoft's C++ runtime, which Windows wheels bring in a folder of its own and Windows may lack."""
_SYSTEMS = {"linux": "linux-gnu", "darwin": "apple-macos", "windows": "windows-gnu"}


def runtime_files(kind: str, triple: str, tvm_version: str) -> list[Path]:
    """The libraries that running a module for ``kind`` on ``triple`` takes, tvm-ffi's last; downloaded once, then in the cache.

    ``tvm_version``: the one that the module was built with. Raises OutputError if there are none for the triple or pip cannot fetch
    them, MissingExtraError if tvm-ffi, whose version counts, is not installed.
    """
    platform = platform_of(triple)
    if platform is None:
        raise OutputError(
            f"TVM publishes no runtime libraries for {triple}: build them from its sources, or package another target"
        )
    wanted = {"tvm": platform.libraries(kind), "tvm_ffi": [platform.ffi_library]}
    folders = [_folder(package, platform, names, tvm_version) for package, names in wanted.items()]
    found = [folder / name for folder, names in zip(folders, wanted.values(), strict=True) for name in names]
    bundled = {path.name: path for folder in folders for path in sorted(folder.glob(_BUNDLED))}
    return [*found, *bundled.values()]


def _folder(package: str, platform: Platform, names: list[str], tvm_version: str) -> Path:
    """A folder with the libraries ``names`` of a package."""
    release = tvm_version if package == "tvm" else _ffi_version()
    here = host()
    installed = _installed(package, release)
    if installed and platform_of(f"{here.machine}-{_SYSTEMS.get(here.system, here.system)}") == platform:
        return installed
    folder = cache_root() / "runtimes" / f"{_PACKAGES[package]}-{release}-{platform.name}"
    if not all((folder / name).is_file() for name in names):
        _fetch(package, release, platform, names, folder)
    return folder


def _ffi_version() -> str:
    try:
        return version(_PACKAGES["tvm_ffi"])
    except ModuleNotFoundError as error:
        raise MissingExtraError("packaging needs apache-tvm-ffi, not installed here: run `pip install llmc`") from error


def _installed(package: str, release: str) -> Path | None:
    """The folder with the libraries of an installed package of that version."""
    spec = importlib.util.find_spec(package)
    if spec is None or version(_PACKAGES[package]) != release:
        return None
    return next((Path(f) / "lib" for f in spec.submodule_search_locations or [] if (Path(f) / "lib").is_dir()), None)


def _fetch(package: str, release: str, platform: Platform, names: list[str], folder: Path) -> None:
    """Have pip download the wheel, and keep its libraries."""
    requirement = f"{_PACKAGES[package]}=={release}"
    with tempfile.TemporaryDirectory(prefix="llmc-wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch, requirement]
        for tag in platform.tags:
            command += ["--platform", tag]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = next((line for line in done.stderr.splitlines() if "ERROR" in line), "no wheel came")
            raise OutputError(
                f"pip cannot fetch {requirement} for {platform.name} ({reason.strip()}): check the network and try again"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            members = {name: f"{package}/lib/{name}" for name in names}
            members |= {Path(m).name: m for m in archive.namelist() if ".libs/" in m and fnmatch(m, f"*/{_BUNDLED}")}
            for name, member in members.items():
                unfinished = folder / f".{name}"
                unfinished.write_bytes(archive.read(member))
                unfinished.replace(folder / name)
