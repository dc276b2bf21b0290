"""The tokenizer a GGUF file describes in its metadata, as a ``tokenizers`` tokenizer.

transformers builds the vocabulary model; the text splitter is chosen here from ``tokenizer.ggml.pre``, because transformers falls
back to GPT-2's splitter for the names it does not list, which gives other token ids without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.gguf.file import GGUFFile
from llmc.importer.huggingface.config import first_line
from llmc.importer.source import TokenizerInfo
from llmc.importer.tokenizer_files import set_ends, template_text, token_ids, write_files

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ONE_DIGIT = (r"\p{N}", _GPT2)
# tokenizer.ggml.pre -> regular expressions that split the text, one after the other (llama.cpp, llama-vocab.cpp);
# names that transformers knows itself are not repeated here
SPLITTERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "gigachat", "mellum", "olmo", "jais", "mpt", "trillion", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _ONE_DIGIT),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "stablelm2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
}
_CONTROL = 3  # tokenizer.ggml.token_type of special tokens
# control tokens that end an answer, by spelling: a GGUF names one end-of-sequence id, chat models often have several
# (llama.cpp collects its end-of-generation set the same way)
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|return|>",
    "<EOT>",
)


def _set_splitter(tokenizer: Any, file: GGUFFile) -> None:
    """Split text as ``tokenizer.ggml.pre`` says (byte-level vocabularies only). Raises UnsupportedError for an unknown name."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if name in GGUF_PRE_TOKENIZER_SPLITS:
        return  # convert_gguf_tokenizer has set it
    if name not in SPLITTERS:
        raise UnsupportedError(
            f"{file.path} splits text by {name!r} (tokenizer.ggml.pre), which llmc does not know, so its token ids would be wrong: "
            "compile the model's Hugging Face folder instead"
        )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITTERS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _set_space_prefix(tokenizer: Any) -> None:
    """A sentencepiece vocabulary whose text must not start with a space that was not written."""
    from tokenizers import decoders, pre_tokenizers

    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def _set_added_ends(tokenizer: Any, file: GGUFFile, model: str) -> None:
    """Put the begin and end tokens around a text that the file wants there. Sentencepiece files begin texts unless they say no."""
    add = {
        "bos": bool(file.metadata.get("tokenizer.ggml.add_bos_token", model == "llama")),
        "eos": bool(file.metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    ids = {kind: token_ids([file.metadata.get(f"tokenizer.ggml.{kind}_token_id")]) for kind in add}
    bos, eos = (tokenizer.id_to_token(ids[kind][0]) if add[kind] and ids[kind] else None for kind in ("bos", "eos"))
    if bos or eos:
        set_ends(tokenizer, bos, eos)


def build_tokenizer(file: GGUFFile) -> Any | None:
    """The ``tokenizers.Tokenizer`` that ``file`` describes; None if it holds no vocabulary.

    Raises UnsupportedError for a kind of tokenizer that transformers or llmc does not know, ModelError for a damaged one.
    """
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES

    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return None
    model = str(file.metadata.get("tokenizer.ggml.model"))
    if model not in GGUF_TOKENIZER_TYPES:
        raise UnsupportedError(
            f"{file.path} has a tokenizer of kind {model!r}, and llmc reads {', '.join(sorted(GGUF_TOKENIZER_TYPES))}: "
            "compile the model's Hugging Face folder instead"
        )
    keys = GGUF_TOKENIZER_MAPPING["tokenizer"]
    fields = {name: file.metadata[f"tokenizer.{key}"] for key, name in keys.items() if f"tokenizer.{key}" in file.metadata}
    try:
        tokenizer, _ = convert_gguf_tokenizer(file.architecture, fields)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"the tokenizer in the metadata of {file.path} is damaged ({first_line(error)})") from error
    if model == "gpt2":
        _set_splitter(tokenizer, file)
    elif file.metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _set_space_prefix(tokenizer)
    _set_added_ends(tokenizer, file, model)
    return tokenizer


def write_gguf_tokenizer(file: GGUFFile, folder: Path) -> TokenizerInfo | None:
    """Write the tokenizer and chat template of ``file`` into ``folder``; None if it has no tokenizer. Raises as above."""
    tokenizer = build_tokenizer(file)
    if tokenizer is None:
        return None

    def ids(*kinds: str) -> list[int]:
        return token_ids(file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds)

    types = file.metadata.get("tokenizer.ggml.token_type") or []
    ends = [tokenizer.token_to_id(spelling) for spelling in _ENDS]
    ends = [i for i in ends if i is not None and i < len(types) and types[i] == _CONTROL]
    eos = token_ids([ids("eos", "eot", "eom"), ends])
    template = template_text(file.metadata.get("tokenizer.chat_template"))
    return write_files(folder, tokenizer, template, ids("bos"), eos, ids("padding"))
