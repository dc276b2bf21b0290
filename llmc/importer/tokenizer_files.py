"""What every source's tokenizer ends in: ``tokenizer.json``, ``chat_template.jinja`` and the ids the runtime needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmc.errors import ModelError, OutputError
from llmc.importer.source import TokenizerInfo

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


def load_tokenizer(path: Path) -> Any:
    """The ``tokenizers.Tokenizer`` in ``path``. Raises ModelError if the file is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every defect of the file
        raise ModelError(f"the tokenizer {path} cannot be read ({' '.join(str(error).split())}): download it again") from error


def template_text(value: Any) -> str | None:
    """The chat template from what ``tokenizer_config.json`` holds: the text, or of a list of named ones the default."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {t["name"]: t["template"] for t in value if isinstance(t, dict) and "name" in t and "template" in t}
        return named.get("default") or next(iter(named.values()), None)
    return None


def token_ids(values: Iterable[Any]) -> list[int]:
    """All ids in ``values``, each an id, a list of ids or None, in order, each once."""
    ids: dict[int, None] = {}
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                ids[item] = None
    return list(ids)


def set_ends(tokenizer: Any, bos: str | None, eos: str | None) -> None:
    """Make ``tokenizer`` put these tokens (of its vocabulary) before and after every text, and nothing else."""
    from tokenizers import processors

    start, end = [bos] if bos else [], [eos] if eos else []
    single = [*start, "$A", *end]
    second = [f"{token}:1" for token in (*start, "$B", *end)]
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(start + end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=[*single, *second], special_tokens=special)


def write_files(
    folder: Path, tokenizer: Any, chat_template: str | None, bos: list[int], eos: list[int], pad: list[int]
) -> TokenizerInfo:
    """Write the files into ``folder`` and say what they hold; of ``bos`` and ``pad`` the first counts.

    ``tokenizer`` is a ``tokenizers.Tokenizer``. Raises OutputError if the folder cannot be written.
    """
    size: int = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        if chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"the tokenizer cannot be written into {folder} ({error.strerror})") from error

    def text(ids: list[int]) -> str:
        return (tokenizer.id_to_token(ids[0]) or "") if ids else ""

    return TokenizerInfo(
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        pad_token_id=pad[0] if pad else None,
        bos_token=text(bos),
        eos_token=text(eos),
        chat_template=chat_template,
        vocab_size=size,
    )
