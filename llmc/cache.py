"""The compile cache: `llmc run MODEL` compiles a model once, and again only if something that matters has changed.

An entry is a folder named by the sha256 of everything the artifact depends on::

    $LLMC_CACHE/artifacts/<name>-<key>/
        artifact/      what the compiler wrote
        ready          there once the artifact is complete; holds what it was made from
        lock           held while one process compiles, so that two do not

Looking an entry up must take milliseconds: models are identified by the sizes, times and headers of their files, not by
all their bytes, and nothing here imports the compiler.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import manifest
from llmc.errors import ModelError, OutputError, UsageError
from llmc.paths import cache_root, records_folder
from llmc.version import __version__

if TYPE_CHECKING:
    from llmc.progress import Progress

HEADER_BYTES = 1 << 20
CONTENT_SUFFIXES = (".json", ".jinja", ".txt", ".model")
BUILDERS = ("apache-tvm", "apache-tvm-ffi", "torch", "transformers")
COMPILER_PARTS = ("llmc.importer", "llmc.dialect", "llmc.passes", "llmc.schedules", "llmc.targets", "llmc.texts")
COMPILER_FILES = ("compiler.py", "settings.py", "weights_file.py", "artifact.py", "manifest.py")


def artifact_for(model: str, options: dict[str, Any], progress: Progress, *, recompile: bool = False) -> Path:
    """The folder of a compiled ``model``: itself if it is an artifact, else its cache entry, compiled if it is not there.

    ``options`` are keyword arguments of :func:`llmc.compile`. Raises what compiling raises, and OutputError if the cache
    cannot be written.
    """
    path = Path(model)
    if (path / manifest.FILE_NAME).is_file():
        return path
    files = _local_files(model)
    if files is not None and not recompile and (hit := _ready(_entry(model, files, options))):
        return hit
    return _compile(model, options, progress, recompile=recompile)


def _compile(model: str, options: dict[str, Any], progress: Progress, *, recompile: bool) -> Path:
    from filelock import FileLock, Timeout

    from llmc.extras import require

    require("compile", f"{model} is not an artifact, and compiling it as a model")
    from llmc.compiler import compile as compile_model
    from llmc.importer.resolve import resolve

    _check_machine(model, options)
    with progress.phase("find model", unit="B") as phase:
        files = resolve(model, progress=phase.callback()).path
    entry = _entry(model, files, options)
    try:
        entry.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry / "lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"another llmc is compiling {model}: waiting for it")
            held = lock.acquire()
    except OSError as error:
        raise OutputError(
            f"the compile cache {entry} cannot be written ({error.strerror}): set LLMC_CACHE to another folder"
        ) from error
    with held:
        if not recompile and (hit := _ready(entry)):
            return hit
        (entry / "ready").unlink(missing_ok=True)
        shutil.rmtree(entry / "artifact", ignore_errors=True)
        compile_model(model, out=entry / "artifact", progress=progress, **options)
        record = json.dumps({"model": model, "files": str(files), "options": options}, indent=1)
        (entry / "ready").write_text(record + "\n", encoding="utf-8")
    return entry / "artifact"


def _check_machine(model: str, options: dict[str, Any]) -> None:
    """Raise UsageError if this machine, which is to run the model, runs code for none of its targets."""
    from llmc import targets
    from llmc.runtime.artifact import gpus_of
    from llmc.targets.here import refused

    specs = options.get("target", "cpu")
    if "cpu" in ([specs] if isinstance(specs, str) else specs):
        return
    chosen = targets.parse_all(specs)
    gpus = gpus_of({target.kind for target in chosen})
    reasons = [why for target in chosen if (why := refused(target, gpus)) is not None]
    if len(reasons) == len(chosen):
        flags = " ".join(f"--target {target.name}" for target in chosen)
        raise UsageError(
            f"{model} would be compiled to run here, and {'; '.join(reasons)}: `llmc compile {model} -o OUT {flags}` makes an "
            "artifact for the machine that has it"
        )


def _ready(entry: Path) -> Path | None:
    return entry / "artifact" if (entry / "ready").is_file() else None


def _entry(model: str, files: Path, options: dict[str, Any]) -> Path:
    label = re.sub(r"[^\w.-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.")
    return cache_root() / "artifacts" / f"{label}-{key(files, options)[:24]}"


def key(files: Path, options: dict[str, Any]) -> str:
    """sha256 hex over the model's files, the options, this machine if the target is the host, and the compiler itself."""
    named = options.get("target", "cpu")
    specs = [named] if isinstance(named, str) else named
    options = {**options, "target": [f"cpu of {_host()}" if spec == "cpu" else spec for spec in specs]}
    if text := options.get("calibration"):
        options["calibration"] = fingerprint(Path(text))
    parts = {
        "model": fingerprint(files),
        "options": options,
        "llmc": __version__,
        "packages": {name: _version(name) for name in BUILDERS},
        "compiler": compiler_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """sha256 hex of a model on disk, from file names, sizes, times and headers: it changes when a file is replaced or edited.

    Small text files (configuration, tokenizer, template) count by content, weight files by size, modification time and header.
    Raises ModelError if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        for file in files:
            stat = file.stat()
            if file.suffix in CONTENT_SUFFIXES:
                content = file.read_bytes()
            else:
                content = struct.pack("<qq", stat.st_size, stat.st_mtime_ns) + _head(file)
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(content).digest())
    except OSError as error:
        raise ModelError(f"the model {path} cannot be read ({error.strerror}: {error.filename})") from error
    return digest.hexdigest()


def compiler_digest() -> str:
    """sha256 hex over every file that shapes an artifact: its own sources (:data:`COMPILER_PARTS`) and the tuning records."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    files = [here / name for name in COMPILER_FILES]
    for package in COMPILER_PARTS:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files += sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".pyc")
    files += sorted(records_folder().glob("*.jsonl"))
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(HEADER_BYTES)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _host() -> str:
    from llmc.runtime.host import host

    machine = host()
    return f"{machine.system} {machine.machine} {machine.cpu_name} {' '.join(sorted(machine.features or ()))}"


def _local_files(model: str) -> Path | None:
    """Where the files of ``model`` are if they are on this machine already; None if they must be fetched or do not exist."""
    path = Path(model)
    if path.exists():
        return path
    from llmc.importer import fetch

    if model in fetch.NAMES:
        return fetch.cached(model)
    return _hub_snapshot(model)


def _hub_snapshot(model: str) -> Path | None:
    """The snapshot folder of a hub id in Hugging Face's cache, as ``refs/`` of that cache records it."""
    name, _, revision = model.partition("@")
    if name.count("/") != 1:
        return None
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    repository = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None
