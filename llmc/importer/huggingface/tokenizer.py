"""A Hugging Face folder's tokenizer: ``tokenizer.json`` as it is, or converted from what older models ship instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.errors import ModelError
from llmc.importer.huggingface.config import CONFIG, first_line, read_json
from llmc.importer.source import TokenizerInfo
from llmc.importer.tokenizer_files import CHAT_TEMPLATE, TOKENIZER, load_tokenizer, template_text, token_ids, write_files

# any of these lets transformers build a tokenizer where there is no tokenizer.json
_CONVERTIBLE = ("tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt")


def _converted(folder: Path) -> Any | None:
    """The backend that transformers builds from ``folder``'s other tokenizer files; None if there are none."""
    from transformers import AutoTokenizer

    found = [name for name in _CONVERTIBLE if (folder / name).is_file()]
    if not found:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} has no {TOKENIZER}, and {', '.join(found)} cannot be converted ({first_line(error)})"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder} has no {TOKENIZER}, and {type(tokenizer).__name__} cannot be written as one")
    return backend


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read ({error})") from error
    if (folder / "chat_template.json").is_file():
        return template_text(read_json(folder / "chat_template.json").get("chat_template"))
    return template_text(settings.get("chat_template"))


def write_folder_tokenizer(source: Path, folder: Path) -> TokenizerInfo | None:
    """Write the tokenizer of the model folder ``source`` into ``folder``; None if the model has none.

    Ids come from ``generation_config.json``, ``tokenizer_config.json`` and ``config.json``, in this order, and only where they are
    written down (a config class's default id belongs to another tokenizer); every end-of-sequence id found stops generation.
    Raises ModelError for damaged files.
    """
    own = (source / TOKENIZER).is_file()
    tokenizer = load_tokenizer(source / TOKENIZER) if own else _converted(source)
    if tokenizer is None:
        return None
    names = ("tokenizer_config.json", "generation_config.json", CONFIG)
    settings, generation, config = (read_json(source / name) if (source / name).is_file() else {} for name in names)
    text_config = config["text_config"] if isinstance(config.get("text_config"), dict) else {}

    def ids(kind: str) -> list[int]:
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        named = tokenizer.token_to_id(text) if isinstance(text, str) else None
        key = f"{kind}_token_id"
        return token_ids((generation.get(key), named, config.get(key), text_config.get(key)))

    return write_files(folder, tokenizer, _chat_template(source, settings), ids("bos"), ids("eos"), ids("pad"))
