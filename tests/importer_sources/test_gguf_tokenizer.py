"""Tokenizers from GGUF metadata: ids of the real model's tokenizer, splitters by name, sentencepiece spaces, end tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.gguf.file import GGUFFile, open_gguf
from llmc.importer.gguf.tokenizer import SPLITTERS, build_tokenizer, write_gguf_tokenizer
from llmc.importer.source import TokenizerInfo

# ids that HuggingFaceTB's own tokenizer.json gives for these texts: with digits one by one, unlike GPT-2's splitter
REAL_IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face": [
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
    ],
    "\n": [198],
}
# no digits in these: there transformers' own conversion of the same file is a reference
TEXTS = [
    "",
    " ",
    "\t\t  \n\n   x",
    "don't we'll I'VE",
    "naïve 東京 🙂 ñandú",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|endoftext|>",
    "def f(x):\n    return x  # why?",
    "ﬁ ½ ² Ⅷ"[:2],
    "e\u0301 \u200d \ufeff",
    "trailing space ",
    "ALL-CAPS_and_snake_case",
]


@pytest.fixture(scope="module")
def written(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TokenizerInfo, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    info = write_gguf_tokenizer(open_gguf(smollm2_gguf), folder)
    assert info is not None
    return Tokenizer.from_file(str(folder / "tokenizer.json")), info, folder


@pytest.mark.parametrize("text", REAL_IDS)
def test_smollm2_ids_of_the_real_tokenizer(written: tuple[Tokenizer, TokenizerInfo, Path], text: str) -> None:
    tokenizer, _, _ = written
    assert tokenizer.encode(text).ids == REAL_IDS[text]
    assert tokenizer.decode(REAL_IDS[text]) == text


def test_smollm2_ids_of_transformers(written: tuple[Tokenizer, TokenizerInfo, Path], smollm2_gguf: Path) -> None:
    tokenizer, _, _ = written
    architecture, fields, _ = get_gguf_tokenizer(str(smollm2_gguf))
    reference, _ = convert_gguf_tokenizer(architecture, fields)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == reference.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    # transformers does not know this file's splitter: GPT-2's would take the second space into the number
    assert tokenizer.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]
    assert reference.encode("x  12").tokens == ["x", "Ġ", "Ġ", "1", "2"]


def test_smollm2_special_tokens_and_template(written: tuple[Tokenizer, TokenizerInfo, Path]) -> None:
    tokenizer, info, folder = written
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert info.eos_token_ids == [2, 0]  # and <|endoftext|>, which ends a text just as well
    assert (info.bos_token_id, info.bos_token, info.eos_token, info.pad_token_id) == (1, "<|im_start|>", "<|im_end|>", 2)
    assert info.vocab_size == 49152
    assert info.chat_template is not None
    assert info.chat_template.startswith("{% for message in messages %}")
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == info.chat_template


BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68)]]


def byte_level(pre: str | None, **more: Any) -> GGUFFile:
    """A byte-level vocabulary of single bytes, so that the ids show nothing but the merges' absence; ``pre`` is the splitter."""
    metadata = {
        "general.architecture": "x",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*BYTES, "12", "<|end|>", "<s>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.merges": ["1 2"],
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        **{f"tokenizer.ggml.{k}": v for k, v in more.items()},
    }
    return GGUFFile(Path("x.gguf"), metadata, {})


@pytest.mark.parametrize(
    ("pre", "merged"),
    [("smollm", False), ("gpt-2", True), (None, True), ("llama-bpe", True), ("qwen2", False), ("stablelm2", False)],
)
def test_digits_stay_single_where_the_splitter_says_so(pre: str | None, merged: bool) -> None:
    tokenizer = build_tokenizer(byte_level(pre))
    assert tokenizer is not None
    assert (256 in tokenizer.encode("a12").ids) == merged
    assert tokenizer.decode(tokenizer.encode("a12 ü\n").ids) == "a12 ü\n"


@pytest.mark.parametrize("pre", SPLITTERS)
def test_every_splitter_keeps_the_text(pre: str) -> None:
    tokenizer = build_tokenizer(byte_level(pre))
    assert tokenizer is not None
    text = "Don't (stop)! 1234.5 naïve 東京\n\n  x\t"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unknown_splitter() -> None:
    with pytest.raises(UnsupportedError, match=r"splits text by 'never-heard' \(tokenizer.ggml.pre\)"):
        build_tokenizer(byte_level("never-heard"))


def test_begin_and_end_tokens_are_added_where_the_file_says_so() -> None:
    ids = {"bos_token_id": 258, "eos_token_id": 257}
    for flags, want in (
        ({}, [0]),
        ({"add_bos_token": True}, [258, 0]),
        ({"add_eos_token": True}, [0, 257]),
        ({"add_bos_token": True, "add_eos_token": True}, [258, 0, 257]),
    ):
        tokenizer = build_tokenizer(byte_level("gpt-2", **ids, **flags))
        assert tokenizer is not None
        assert tokenizer.encode("!").ids == want
        assert tokenizer.encode("!", add_special_tokens=False).ids == [0]


def test_control_tokens_that_end_an_answer(tmp_path: Path) -> None:
    info = write_gguf_tokenizer(byte_level("gpt-2", eos_token_id=258, eot_token_id=256), tmp_path)
    assert info is not None
    assert info.eos_token_ids == [258, 256, 257]
    assert info.chat_template is None
    assert not (tmp_path / "chat_template.jinja").exists()


def sentencepiece(**more: Any) -> GGUFFile:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "\u2581", "a", "b", "ab", "\u2581ab"]
    metadata = {
        "general.architecture": "x",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-5.0, -4.0, -3.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{k}": v for k, v in more.items()},
    }
    return GGUFFile(Path("x.gguf"), metadata, {})


def test_sentencepiece() -> None:
    tokenizer = build_tokenizer(sentencepiece())
    assert tokenizer is not None
    assert tokenizer.encode("ab").ids == [1, 263]  # begins the text, and with a space
    assert tokenizer.encode("ü").ids == [1, 259, 3 + 0xC3, 3 + 0xBC]
    assert tokenizer.decode([1, 263]) == "ab"


def test_sentencepiece_without_space_prefix() -> None:
    tokenizer = build_tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert tokenizer is not None
    assert tokenizer.encode("ab").ids == [262]
    assert tokenizer.encode(" ab").ids == [263]
    assert tokenizer.decode([263]) == " ab"


def test_no_tokenizer() -> None:
    assert build_tokenizer(GGUFFile(Path("x.gguf"), {"general.architecture": "x"}, {})) is None


def test_unknown_kind_and_damage() -> None:
    with pytest.raises(UnsupportedError, match=r"a tokenizer of kind 'rwkv', and llmc reads gemma4, gpt2, llama, t5"):
        build_tokenizer(byte_level(None, model="rwkv"))
    with pytest.raises(ModelError, match=r"the tokenizer in the metadata of x.gguf is damaged"):
        file = sentencepiece()
        del file.metadata["tokenizer.ggml.scores"]
        build_tokenizer(file)
