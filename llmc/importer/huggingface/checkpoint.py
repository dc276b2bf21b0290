"""A folder's safetensors checkpoint: one file, shards listed by an index, or several files without an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import ModelError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.safetensors_file import read_header
from llmc.importer.params import Source
from llmc.importer.source import Progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor by its stored name, and the files they are in."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, FileTensor]

    def fingerprint(self) -> str:
        """sha256 hex over every tensor's name, dtype, shape and place, and each file's name, size and mtime."""
        digest = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name, source in sorted(self.tensors.items()):
            digest.update(f"{name} {source.dtype} {source.shape} {source.file.name} {source.offset}\n".encode())
        return digest.hexdigest()


def natural_dtype(sources: Iterable[Source]) -> str:
    """The floating-point dtype that most bytes of the plain tensors are stored in; float32 if there is none."""
    sizes: dict[str, int] = {}
    for source in sources:
        if isinstance(source, FileTensor) and "float" in source.dtype:
            sizes[source.dtype] = sizes.get(source.dtype, 0) + source.nbytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else "float32"


def _indexed_files(folder: Path, index: Path) -> dict[str, list[str]]:
    """Shard file name -> the tensors the index says it holds."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            shards.setdefault(str(file), []).append(str(tensor))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the shard index {index} cannot be read ({type(error).__name__}: {error}): download it again") from error
    absent = sorted(f for f in shards if not (folder / f).is_file())
    if absent:
        raise ModelError(
            f"{index} lists {len(shards)} shards, and these are missing in {folder}: {', '.join(absent)}; download them again"
        )
    return shards


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder`` that make up its checkpoint, in name order; empty if there are none.

    The index decides where there is one; then ``model.safetensors``; then every ``*.safetensors`` file. Adapter files
    (``adapter_model.safetensors``) are not weights of a model.
    """
    if (folder / INDEX).is_file():
        return [folder / f for f in sorted(_indexed_files(folder, folder / INDEX))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    return sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("adapter_"))


def open_checkpoint(folder: Path, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint in ``folder``; reads headers only.

    Raises ModelError for missing shards, a tensor that the index places in a shard that lacks it, a tensor in two shards, and
    damaged files.
    """
    files = weight_files(folder)
    tensors: dict[str, FileTensor] = {}
    for done, file in enumerate(files):
        if progress:
            progress(done, len(files), f"reading the header of {file.name}")
        for name, source in read_header(file).items():
            if name in tensors:
                raise ModelError(
                    f"tensor {name!r} is in two files of {folder}, {tensors[name].file.name} and {file.name}: "
                    "keep the files of one checkpoint only"
                )
            tensors[name] = source
    if (folder / INDEX).is_file():
        for shard, names in _indexed_files(folder, folder / INDEX).items():
            for name in names:
                if name not in tensors or tensors[name].file.name != Path(shard).name:
                    raise ModelError(
                        f"{folder / INDEX} places tensor {name!r} in {shard}, which does not hold it: download both again"
                    )
    return Checkpoint(folder, tuple(files), tensors)
