"""MODEL on the command line: what each kind of path and name becomes, and the sentence for each that is not a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmc.errors import LlmcError, ModelError
from llmc.importer import fetch
from llmc.importer.gguf.model import GGUFModel
from llmc.importer.huggingface import hub
from llmc.importer.huggingface.model import HuggingFaceModel
from llmc.importer.resolve import resolve
from tests.importer_sources.gguf_writer import write_gguf


def small_llama(folder: Path) -> Path:
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def small_gguf(path: Path) -> Path:
    keys = {
        "llama.context_length": 64,
        "llama.block_count": 1,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 9,
    }
    return write_gguf(path, "llama", keys, {"token_embd.weight": np.zeros((9, 8), np.float32)})


def message(model: str | Path) -> str:
    with pytest.raises(LlmcError) as error:
        resolve(str(model))
    text = str(error.value)
    assert "\n" not in text
    return text


def test_folder(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    source = resolve(str(small_llama(tmp_path / "my-llama")), progress=lambda *step: steps.append(step))
    assert isinstance(source, HuggingFaceModel)
    assert (source.name, source.kind, source.dtype, source.config.model_type) == ("my-llama", "huggingface", "bfloat16", "llama")
    assert steps == [(0, 1, "reading the header of model.safetensors")]
    assert len(source.fingerprint()) == 64
    config = tmp_path / "my-llama" / "config.json"
    before = source.fingerprint()
    config.write_text(config.read_text() + "\n")
    assert resolve(str(tmp_path / "my-llama")).fingerprint() != before


@pytest.mark.parametrize("name", ["m.gguf", "sha256-of-a-blob"])
def test_gguf_file(tmp_path: Path, name: str) -> None:
    source = resolve(str(small_gguf(tmp_path / name)))
    assert isinstance(source, GGUFModel)
    assert (source.name, source.kind, source.dtype) == (Path(name).stem, "gguf", "float32")


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    small_gguf(tmp_path / "m.gguf")
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path)).path == tmp_path / "m.gguf"
    small_gguf(tmp_path / "n.gguf")
    assert message(tmp_path).endswith("holds 2 GGUF files: give one of them (m.gguf, n.gguf)")


def test_known_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "x.gguf")
    monkeypatch.setattr(fetch, "fetch", lambda name, progress: path)
    source = resolve("smollm2-135m")
    assert (source.name, source.path) == ("smollm2-135m", path)


def test_missing_path(tmp_path: Path) -> None:
    (tmp_path / "llama-3-8b").mkdir()
    assert message(tmp_path / "lama-3-8b").endswith(f"lama-3-8b'; did you mean {tmp_path / 'llama-3-8b'}?")
    assert "give a folder with config.json" in message(tmp_path / "zzz")
    assert "did you mean smollm2-135m?" in message("smollm-135m")
    assert "there is no model" in message("org/model/file.gguf")


def test_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sub").mkdir()
    assert "is not a model (it holds notes.txt, sub): give" in message(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "is not a model (it holds nothing)" in message(tmp_path / "empty")


def test_folder_with_half_a_model(tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert message(folder).endswith("has a config.json but no weights (*.safetensors or *.gguf): download them too")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert "no weights" in message(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model" in message(folder)
    other = small_llama(tmp_path / "n")
    (other / "config.json").unlink()
    assert message(other).endswith("has weights but no config.json: download the model's config.json too")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80")
    for model in (tmp_path, tmp_path / name):
        text = message(model)
        assert f"{tmp_path / name} is a pickle checkpoint, which can run code when it is loaded" in text
        assert f"from_pretrained('{tmp_path}').save_pretrained('{tmp_path}-safetensors')" in text


def test_other_files(tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "m")
    assert message(folder / "model.safetensors").endswith(f"is one file of a model: give its folder, {folder}")
    assert message(folder / "config.json").endswith(f"is one file of a model: give its folder, {folder}")
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is not a model llmc can read" in message(tmp_path / "notes.txt")
    (tmp_path / "cut.gguf").write_bytes(b"GG")
    assert "cut.gguf is truncated" in message(tmp_path / "cut.gguf")


def test_artifact(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1}))
    assert "is a compiled artifact, not a model: run it with `llmc run" in message(tmp_path)


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "there is no path 'org/name', and as a hub model it is not in the cache and HF_HUB_OFFLINE is set" in message("org/name")
    assert "not in the cache at revision 'v2' and HF_HUB_OFFLINE is set" in message("org/name@v2")


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


class Response:
    """What hub errors ask of an HTTP response."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request = None
        self.status_code = 404


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.GatedRepoError("x", response=Response()), "needs permission: accept its licence"),  # type: ignore[arg-type]
        (errors.RepositoryNotFoundError("x", response=Response()), "there is no path and no hub model 'org/name'"),  # type: ignore[arg-type]
        (errors.RevisionNotFoundError("x", response=Response()), "has no revision 'v2'"),  # type: ignore[arg-type]
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (errors.HFValidationError("bad\nid"), "could not be downloaded (bad id)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    failing(monkeypatch, error)
    assert expected in message("org/name@v2")


def test_hub_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "snapshot")
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        bar = options["tqdm_class"](total=100, unit="B", desc="model.safetensors")  # type: ignore[operator]
        for _ in range(10):
            bar.update(10)
        bar.close()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    steps: list[tuple[int, int, str]] = []
    source = resolve("org/name@v2", progress=lambda *step: steps.append(step))
    assert (source.name, source.path) == ("name", folder)
    assert (asked["name"], asked["revision"]) == ("org/name", "v2")
    assert (100, 100) in {(done, total) for done, total, _ in steps}


def test_hub_wants_no_subfolders_and_no_second_copy() -> None:
    from fnmatch import fnmatch

    def wanted(file: str) -> bool:
        return any(fnmatch(file, p) for p in hub._WANTED) and not any(fnmatch(file, p) for p in hub._UNWANTED)

    assert all(
        map(wanted, ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "tokenizer.model", "merges.txt"])
    )
    assert not any(
        map(wanted, ["original/x.safetensors", "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "x.gguf"])
    )


def test_unusable_name() -> None:
    with pytest.raises(ModelError, match=r"is not a model: give"):
        resolve("x" * 5000)
