"""Tokenizers of Hugging Face folders: token ids equal transformers', templates and special ids from wherever they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmc.errors import ModelError
from llmc.importer.huggingface.tokenizer import write_folder_tokenizer

TEXTS = ["", "Hello, world!", "  two  spaces\n\n\ttab", "naïve café 東京 🙂", "12345 67", "<s>hi</s>", "don't"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "don't hello world 12345", "naïve café 東京"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A trained byte-level BPE with three special tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(CORPUS * 20, trainer)
    return trained


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "model"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def test_tokenizer_json_is_kept(model: Path, tmp_path: Path) -> None:
    info = write_folder_tokenizer(model, tmp_path / "out")
    assert info is not None
    reference = AutoTokenizer.from_pretrained(model)
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in TEXTS:
        assert written.encode(text).ids == reference(text).input_ids
    assert (info.bos_token_id, info.eos_token_ids, info.pad_token_id) == (0, [1], 2)
    assert (info.bos_token, info.eos_token, info.chat_template, info.vocab_size) == ("<s>", "</s>", None, len(reference))


FLAGS = [{"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}, {"add_eos_token": True}]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("old", [False, True])
def test_added_ends_as_transformers(model: Path, tmp_path: Path, tokenizer: Tokenizer, flags: dict[str, bool], old: bool) -> None:
    """The flags count where transformers converts an old tokenizer; a tokenizer.json says itself what it adds."""
    if old:
        (model / "tokenizer.json").unlink()
        tokenizer.model.save(str(model))
        edit(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        edit(model / "config.json", model_type="gpt2")
    else:
        ends = Tokenizer.from_file(str(model / "tokenizer.json"))
        ends.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 2)])
        ends.save(str(model / "tokenizer.json"))
    edit(model / "tokenizer_config.json", **flags)
    write_folder_tokenizer(model, tmp_path / "out")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        assert written.encode(text).ids == reference(text).input_ids
    assert written.encode("").ids == (
        [0] * flags.get("add_bos_token", False) + [1] * flags.get("add_eos_token", False) if old else [2]
    )


def test_truncation_and_padding_are_removed(model: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(3)
    cut.enable_padding(length=8)
    cut.save(str(model / "tokenizer.json"))
    write_folder_tokenizer(model, tmp_path / "out")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("the quick brown fox").ids == tokenizer.encode("the quick brown fox").ids


def test_vocabulary_and_merges_are_converted(model: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    tokenizer.model.save(str(folder))
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", bos_token="<s>", eos_token="</s>", unk_token="</s>")
    edit(folder / "config.json", model_type="gpt2")
    assert not (folder / "tokenizer.json").exists()
    info = write_folder_tokenizer(folder, tmp_path / "out")
    assert info is not None
    assert info.eos_token_ids == [1]
    reference = AutoTokenizer.from_pretrained(folder)
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in TEXTS:
        assert written.encode(text).ids == reference(text).input_ids


def test_no_tokenizer(tmp_path: Path) -> None:
    assert write_folder_tokenizer(tmp_path, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


def test_damaged_tokenizer(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError, match=r"the tokenizer .*tokenizer.json cannot be read"):
        write_folder_tokenizer(model, tmp_path / "out")


def test_every_end_id_counts(model: Path, tmp_path: Path) -> None:
    edit(model / "generation_config.json", eos_token_id=[7, 1], bos_token_id=5)
    edit(model / "config.json", eos_token_id=9, text_config={"eos_token_id": [11]})
    edit(model / "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False})
    info = write_folder_tokenizer(model, tmp_path / "out")
    assert info is not None
    assert info.eos_token_ids == [7, 1, 9, 11]
    assert info.bos_token_id == 5


LIST_FORM = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(("value", "want"), [("{{ x }}", "{{ x }}"), (LIST_FORM, "D"), (LIST_FORM[:1], "T"), (None, None)])
def test_template_in_tokenizer_config(model: Path, tmp_path: Path, value: Any, want: str | None) -> None:
    edit(model / "tokenizer_config.json", chat_template=value)
    info = write_folder_tokenizer(model, tmp_path / "out")
    assert info is not None
    assert info.chat_template == want
    file = tmp_path / "out" / "chat_template.jinja"
    assert (file.read_text() if file.exists() else None) == want


def test_template_file_wins(model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template="old")
    edit(model / "chat_template.json", chat_template="json")
    info = write_folder_tokenizer(model, tmp_path / "a")
    assert info is not None
    assert info.chat_template == "json"
    (model / "chat_template.jinja").write_text("file ü")
    info = write_folder_tokenizer(model, tmp_path / "b")
    assert info is not None
    assert info.chat_template == "file ü"
