"""Reading safetensors checkpoints: every dtype and layout against the safetensors package, and every way a file can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.binding import to_torch
from llmc.importer.finite import check_finite
from llmc.importer.huggingface.checkpoint import INDEX, natural_dtype, open_checkpoint
from llmc.importer.huggingface.safetensors_file import read_header
from llmc.importer.params import DTYPES, Constant

TORCH_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


@pytest.mark.parametrize("dtype", [*TORCH_DTYPES, torch.bool])
def test_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": random((3, 5, 7), dtype), "scalar": random((), dtype, 1), "empty": torch.empty((0, 4), dtype=dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        array = header[name].read()
        assert array.shape == tuple(tensor.shape) == header[name].shape
        assert array.dtype == DTYPES[header[name].dtype]
        assert torch.equal(to_torch(array), tensor)


def test_unaligned_data_is_readable(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (-(len(header) + 3) % 8)  # data then starts at an odd offset
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + np.float32([1, 2]).tobytes())
    array = read_header(tmp_path / "x.safetensors")["a"].read()
    assert array.flags.aligned
    assert array.tolist() == [1, 2]


def test_values_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    source = read_header(tmp_path / "x.safetensors")["a"]
    source.read()[:] = 7
    assert source.read().tolist() == [1, 1, 1, 1]


def test_reading_leaves_nothing_in_memory(tmp_path: Path) -> None:
    size, count = 64 << 20, 6
    entries = {f"w{i}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}
    header = json.dumps(entries).encode()
    with (tmp_path / "x.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + count * size)
    before = psutil.Process().memory_info().rss
    peak = 0
    for source in read_header(tmp_path / "x.safetensors").values():
        assert float(source.read()[::1024].sum()) == 0.0  # touches every page
        peak = max(peak, psutil.Process().memory_info().rss - before)
    assert peak < 1.5 * size


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    save_file({"first": torch.ones(8, 4), "last": torch.ones(16)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_truncated_data_names_tensor_and_bytes(one_file: Path) -> None:
    size = one_file.stat().st_size
    one_file.write_bytes(one_file.read_bytes()[:-10])
    with pytest.raises(
        ModelError, match=rf"model.safetensors is truncated: tensor 'last' ends at byte {size}, and the file has {size - 10}"
    ):
        read_header(one_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"x" * 100, "states a header of 1099511627776 bytes"),
        ((500).to_bytes(8, "little") + b"{}", "its header ends at byte 508, and the file has 10"),
        ((4).to_bytes(8, "little") + b"{{{{", "bytes 8 to 12, is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is not a JSON object"),
        ((8).to_bytes(8, "little") + b'{"a":{}}', "tensor 'a' lacks dtype"),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_entry_that_contradicts_itself(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"tensor 'w' of F32 \[3\] is given bytes 0 to 8"):
        read_header(tmp_path / "x.safetensors")


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4).to(torch.float8_e5m2)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match=r"x.safetensors:w is stored as F8_E5M2"):
        read_header(tmp_path / "x.safetensors")


def shards(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")


def test_shards_with_and_without_index(tmp_path: Path) -> None:
    shards(tmp_path)
    bare = open_checkpoint(tmp_path)
    assert {n: s.file.name[:11] for n, s in bare.tensors.items()} == {"a": "model-00001", "b": "model-00002"}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


def test_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lists 2 shards, and these are missing in .*: gone.safetensors"):
        open_checkpoint(tmp_path)


def test_tensor_not_in_its_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"places tensor 'c' in model-00002-of-00002.safetensors, which does not hold it"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(
        ModelError, match=r"tensor 'a' is in two files of .*, model-00001-of-00002.safetensors and more.safetensors"
    ):
        open_checkpoint(tmp_path)


def test_broken_index(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ModelError, match=r"shard index .* cannot be read"):
        open_checkpoint(tmp_path)


def test_fingerprint_and_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    first = open_checkpoint(tmp_path)
    assert natural_dtype(first.tensors.values()) == "bfloat16"
    assert first.fingerprint() == open_checkpoint(tmp_path).fingerprint()
    save_file({"a": torch.ones(8, dtype=torch.bfloat16), "c": torch.ones(2)}, tmp_path / "model.safetensors")
    assert first.fingerprint() != open_checkpoint(tmp_path).fingerprint()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_not_finite(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.importer.finite._CHUNK", 5)
    array = np.zeros((4, 6), DTYPES[dtype])
    source = Constant(array, "model.safetensors:lm_head.weight")
    check_finite(array, source)
    array[1, 3] = np.nan
    array[3, 5] = -np.inf
    with pytest.raises(
        ModelError,
        match=r"model.safetensors:lm_head.weight holds 2 NaN or infinite values out of 24 \(first: nan at index \[1, 3\]\)",
    ):
        check_finite(array, source)


def test_integers_are_finite() -> None:
    check_finite(np.full(3, -1, np.int64), Constant(np.zeros(1), "ids"))
