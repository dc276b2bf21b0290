"""Models named by a hub id, ``org/name`` or ``org/name@revision``, downloaded by huggingface_hub into its own cache."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from llmc.errors import ModelError
from llmc.importer.huggingface.config import first_line
from llmc.importer.source import Progress

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# what a model in Hugging Face's layout consists of; subfolders and second copies of the weights are not needed
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]


def _reporting_bar(progress: Progress | None, what: str) -> type[Any]:
    """A tqdm class that draws nothing and tells ``progress`` the bytes done so far, as ``what``."""
    from tqdm.std import tqdm  # not the hub's own subclass, which a global switch disables, and a disabled bar does not count

    # the hub counts bytes twice, as received and as written, and not always both: the further count is the progress
    counting: list[Any] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # ``name`` is the hub's own; any bar ends a line when it is closed
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            if self.unit == "B":
                counting.append(self)

        def display(self, *args: Any, **kwargs: Any) -> None:
            if progress and counting:
                progress(int(max(b.n for b in counting)), int(max(b.total or 0 for b in counting)), what)

    return Bar


def download(model: str, progress: Progress | None = None) -> Path:
    """The folder of the hub model ``model``, downloaded unless it is in Hugging Face's cache. ``HF_HUB_OFFLINE=1`` is respected.

    Raises ModelError if there is no such model or revision, if it needs permission, or if the hub cannot be reached.
    """
    from huggingface_hub import constants, errors, snapshot_download

    match = HUB_ID.fullmatch(model)
    if match is None:
        raise ModelError(f"{model!r} is not a hub id: write org/name or org/name@revision")
    name, revision = match.group("name"), match.group("revision")
    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            tqdm_class=_reporting_bar(progress, f"downloading {name}"),
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub model {name} needs permission: accept its licence on its page, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub model {name} has no revision {revision!r}: use a branch, a tag or a commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no path and no hub model {name!r}: check the spelling, or run `hf auth login` if the model is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        raise ModelError(
            f"there is no path {name!r}, and as a hub model it is not in the cache{at} and {reason}: "
            "connect to the network, or give the path of a model"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise ModelError(f"the hub model {name}{at} could not be downloaded ({first_line(error)})") from error
    return Path(folder)
