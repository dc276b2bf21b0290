"""The command line's MODEL to a model source: a folder, a GGUF file, a known name, or a hub id."""

from __future__ import annotations

import difflib
from pathlib import Path

from llmc import manifest
from llmc.errors import LlmcError, ModelError
from llmc.importer import fetch
from llmc.importer.gguf.model import GGUFModel
from llmc.importer.huggingface import hub
from llmc.importer.huggingface.checkpoint import weight_files
from llmc.importer.huggingface.config import CONFIG, first_line
from llmc.importer.huggingface.model import HuggingFaceModel
from llmc.importer.source import ModelSource, Progress

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NAMES_SHOWN = 8
_KINDS = "a folder with config.json and *.safetensors, a .gguf file, smollm2-135m, or a hub id (org/name[@rev])"


def resolve(model: str, *, progress: Progress | None = None) -> ModelSource:
    """Open the model that ``model`` names, reading headers only; fetches it first if it is a known name or a hub id.

    A local path wins over a name. Raises ModelError if there is no such model or it cannot be read, UnsupportedError if it can,
    but is of a kind that llmc does not compile.
    """
    path = Path(model).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name no file system takes
        raise ModelError(f"{model!r} is not a model: give {_KINDS} ({first_line(error)})") from error
    if exists:
        return _folder(path, None, progress) if path.is_dir() else _file(path)
    if model in fetch.NAMES:
        return GGUFModel(fetch.fetch(model, progress), name=model)
    close = _close_matches(path)
    hub_id = hub.HUB_ID.fullmatch(model)
    if hub_id and path.suffix != ".gguf" and not close:
        return _folder(hub.download(model, progress), hub_id["name"].partition("/")[2], progress)
    names = difflib.get_close_matches(model, list(fetch.NAMES), 1)
    meant = f"; did you mean {', '.join([*close, *names])}?" if close or names else f": give {_KINDS}"
    raise ModelError(f"there is no model {model!r}{meant}")


def _close_matches(path: Path) -> list[str]:
    """Paths beside the missing ``path`` with a similar name."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, 3)]


def _file(path: Path) -> ModelSource:
    if path.suffix in _PICKLES:
        raise _pickle_error(path, path.parent)
    if path.suffix == ".safetensors" or path.name == CONFIG:
        raise ModelError(f"{path} is one file of a model: give its folder, {path.parent}")
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    if magic == b"GGUF" or path.suffix == ".gguf":
        return GGUFModel(path)
    raise ModelError(f"{path} is not a model llmc can read: give {_KINDS}")


def _pickle_error(file: Path, folder: Path) -> LlmcError:
    return ModelError(
        f"{file} is a pickle checkpoint, which can run code when it is loaded, so llmc does not read it: convert the model with "
        f'`python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[c.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') for c in (M, T)]\"`"
    )


def _folder(path: Path, name: str | None, progress: Progress | None) -> ModelSource:
    try:
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
    except OSError as error:
        raise ModelError(f"the folder {path} cannot be read ({error.strerror})") from error
    names = {f.name for f in files}
    ggufs = [f for f in files if f.suffix == ".gguf" and not f.name.startswith("mmproj")]
    pickles = [f for f in files if f.suffix in _PICKLES and f.name != "training_args.bin"]
    if manifest.FILE_NAME in names:
        raise ModelError(f"{path} is a compiled artifact, not a model: run it with `llmc run {path}`")
    if CONFIG in names and weight_files(path):
        return HuggingFaceModel(path, name, progress)
    if len(ggufs) == 1:
        return GGUFModel(ggufs[0], name)
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} GGUF files: give one of them ({_listed(ggufs)})")
    if pickles:
        raise _pickle_error(pickles[0], path)
    if "adapter_config.json" in names:
        raise ModelError(f"{path} is an adapter, not a model: merge it into its base model and save that")
    if CONFIG in names:
        raise ModelError(f"{path} has a {CONFIG} but no weights (*.safetensors or *.gguf): download them too")
    if any(f.suffix == ".safetensors" for f in files):
        raise ModelError(f"{path} has weights but no {CONFIG}: download the model's {CONFIG} too")
    raise ModelError(f"{path} is not a model (it holds {_listed(sorted(path.iterdir())) or 'nothing'}): give {_KINDS}")


def _listed(entries: list[Path]) -> str:
    more = f" and {len(entries) - _NAMES_SHOWN} more" if len(entries) > _NAMES_SHOWN else ""
    return ", ".join(e.name for e in entries[:_NAMES_SHOWN]) + more
