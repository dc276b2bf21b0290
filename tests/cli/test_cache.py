"""The compile cache: what makes a new entry, what does not, and that a lookup stays cheap."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc import cache
from llmc.errors import ModelError, OutputError, UsageError
from llmc.progress import SilentProgress

OPTIONS = {"target": "cpu", "dtype": None, "kv_dtype": None, "max_batch": 8, "page_size": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(2 << 20))
    return folder


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the compiler, and a list of what it compiled."""
    calls: list[str] = []

    def compile_model(model: str, *, out: Path, progress: object, **options: object) -> None:
        calls.append(model)
        time.sleep(0.2)
        out.mkdir()
        (out / "manifest.json").write_text("{}", encoding="utf-8")

    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "llmc.compiler", SimpleNamespace(compile=compile_model))  # type: ignore[arg-type]
    resolver = SimpleNamespace(resolve=lambda name, progress=None: SimpleNamespace(path=Path(name)))
    monkeypatch.setitem(sys.modules, "llmc.importer.resolve", resolver)  # type: ignore[arg-type]
    return calls


def get(model: Path, **changes: object) -> Path:
    return cache.artifact_for(str(model), {**OPTIONS, **changes}, SilentProgress())


def test_second_lookup_hits(model: Path, compiled: list[str]) -> None:
    first = get(model)
    assert get(model) == first and (first / "manifest.json").is_file()
    assert len(compiled) == 1


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"kv_dtype": "float16"}, {"target": "cpu:x86-64-v3"}, {"max_batch": 4}])
def test_every_option_counts(model: Path, compiled: list[str], change: dict[str, object]) -> None:
    assert get(model) != get(model, **change)
    assert len(compiled) == 2


def test_a_model_for_another_machine_is_not_compiled(model: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only to be refused when it is loaded; one of several targets that runs here is enough."""
    monkeypatch.setattr("llmc.runtime.artifact.cuda_devices", list)
    words = r"no NVIDIA driver answers .*`llmc compile .* -o OUT --target cuda:sm_80 --target cuda:sm_90a`"
    with pytest.raises(UsageError, match=words):
        get(model, target=["cuda:sm_80,sm_90a"])
    assert not compiled
    get(model, target=["cuda:sm_90a", "cpu"])
    assert len(compiled) == 1


def test_an_edited_model_is_another_one(model: Path, compiled: list[str]) -> None:
    first = get(model)
    (model / "config.json").write_text('{"model_type": "y"}', encoding="utf-8")
    second = get(model)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] = 1  # far from the header, same size: only the modification time tells
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 10**18))
    third = get(model)
    assert len({first, second, third}) == 3 == len(compiled)


def test_a_touched_text_file_is_the_same_model(model: Path, compiled: list[str]) -> None:
    first = get(model)
    os.utime(model / "config.json", ns=(1, 1))
    assert get(model) == first


def test_versions_and_compiler_sources_count(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache.key(model, OPTIONS)}
    with monkeypatch.context() as patch:
        patch.setattr(cache, "__version__", "9.9.9")
        keys.add(cache.key(model, OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_version", lambda name: "1.0")
        keys.add(cache.key(model, OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "compiler_digest", lambda: "other")
        keys.add(cache.key(model, OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_host", lambda: "another processor")
        keys.add(cache.key(model, OPTIONS))
        named = cache.key(model, {**OPTIONS, "target": "cpu:x86-64-v3"})
    assert len(keys) == 5
    assert named == cache.key(model, {**OPTIONS, "target": "cpu:x86-64-v3"}), "a named target does not depend on this machine"


def test_compiler_digest_covers_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for part in cache.COMPILER_PARTS:
        with monkeypatch.context() as patch:
            patch.setattr(cache, "COMPILER_PARTS", tuple(p for p in cache.COMPILER_PARTS if p != part))
            digests.add(cache.compiler_digest())
    assert len(digests | {cache.compiler_digest()}) == len(cache.COMPILER_PARTS) + 1


def test_an_unfinished_entry_is_made_again(model: Path, compiled: list[str]) -> None:
    first = get(model)
    (first.parent / "ready").unlink()
    (first / "leftover").write_text("half", encoding="utf-8")
    again = get(model)
    assert again == first and len(compiled) == 2 and not (again / "leftover").exists()


def test_recompile_ignores_the_entry(model: Path, compiled: list[str]) -> None:
    get(model)
    cache.artifact_for(str(model), OPTIONS, SilentProgress(), recompile=True)
    assert len(compiled) == 2


def test_two_at_once_compile_once(model: Path, compiled: list[str]) -> None:
    threads = [threading.Thread(target=get, args=(model,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def test_an_artifact_is_itself(artifact: Path, compiled: list[str]) -> None:
    assert get(artifact) == artifact and not compiled


def test_a_cache_that_cannot_be_written(model: Path, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="LLMC_CACHE"):
        get(model)


def test_an_unreadable_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        cache.fingerprint(tmp_path / "nothing")


def test_a_hub_id_is_found_where_the_hub_library_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cache._local_files("org/name") is None
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    assert cache._local_files("org/name") == snapshot
    assert cache._local_files("org/name@c0ffee") == snapshot
    assert cache._local_files("org/name@v2") is None


def test_a_lookup_imports_no_compiler(model: Path, compiled: list[str]) -> None:
    """In a process of its own: the key of a model on disk or in the cache, without TVM, torch, transformers or NumPy."""
    code = (
        "import sys; from pathlib import Path; from llmc import cache\n"
        "cache._local_files('smollm2-135m'); cache._local_files('org/name')\n"
        f"files = cache._local_files({str(model)!r}); cache._ready(cache._entry('m', files, {OPTIONS!r}))\n"
        "heavy = {'tvm', 'tvm_ffi', 'torch', 'transformers', 'numpy', 'huggingface_hub', 'filelock'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
