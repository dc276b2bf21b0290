"""The GGUF parser: everything the gguf package writes comes back, and every way a file can be broken is named."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.gguf.file import GGUFSource, open_gguf
from llmc.importer.rows import Rows, row_order
from llmc.passes.quantize.native import QuantizedSource

METADATA: dict[str, Any] = {
    "a.int": 7,
    "a.flag": True,
    "a.float": 0.1,
    "a.text": "naïve 東京",
    "a.empty": "",
    "a.ints": [3, 1, 2],
    "a.texts": ["x", "", "ü"],
    "a.floats": [0.5, -1.0],
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict[str, Any] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (METADATA if metadata is None else metadata).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            if value == "":  # the package's add_string drops empty strings
                writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
            else:
                kinds[type(value)](key, value)  # type: ignore[operator]
    for name, (values, kind) in tensors.items():
        quantization = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_metadata_and_tensors(tmp_path: Path) -> None:
    kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    path = write(tmp_path / "x.gguf", {f"t.{k}": (random(3, 5, 64), k) for k in kinds})
    file = open_gguf(path)
    assert file.architecture == "llama"
    assert {k: v for k, v in file.metadata.items() if k != "a.float" and k.startswith("a.")} == {
        k: v for k, v in METADATA.items() if k != "a.float"
    }
    assert file.metadata["a.float"] == float(np.float32(0.1))
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        source = file.tensors[tensor.name]
        assert source.shape == (3, 5, 64)
        assert source.describe() == f"x.gguf:{tensor.name}"
        assert np.array_equal(source.read().astype(np.float32), gguf.dequantize(tensor.data, tensor.tensor_type).reshape(3, 5, 64))
        if isinstance(source, GGUFSource):
            assert (source.scheme, source.dtype) == (tensor.name[2:], "float32")
            assert np.array_equal(source.blocks(), tensor.data.reshape(3, 5, -1))
        else:
            assert not isinstance(source, QuantizedSource)
            assert source.dtype == source.scheme == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[tensor.name[2:]]


def test_rows_move_with_their_blocks(tmp_path: Path) -> None:
    source = open_gguf(write(tmp_path / "x.gguf", {"w": (random(6, 64), "Q4_1")})).tensors["w"]
    assert isinstance(source, GGUFSource)
    order = np.array([3, 1, 5, 0, 2, 4])
    moved = Rows((source,), order, (6, 64))
    assert isinstance(moved, QuantizedSource)
    assert np.array_equal(moved.read(), source.read()[order])
    assert np.array_equal(moved.quantized().codes, source.quantized().codes[order])
    assert np.array_equal(moved.quantized().dequantize(), moved.read())
    assert (moved.scheme, moved.shape, moved.dtype) == ("Q4_1", (6, 64), "float32")


def test_functions_that_take_rows_are_told_from_others() -> None:
    order = np.array([2, 0, 1, 3])
    found = row_order(lambda a: a[order], [(4, 9)], (4, 9))
    assert found is not None
    assert found.tolist() == order.tolist()
    vector = row_order(lambda a: a[::-1], [(5,)], (5,))
    assert vector is not None
    assert vector.tolist() == [4, 3, 2, 1, 0]
    stacked = row_order(lambda a, b: np.stack([b, a]), [(2, 9), (2, 9)], (2, 2, 9))
    assert stacked is not None
    assert stacked.tolist() == [2, 3, 0, 1]
    others = [
        lambda a: a - 1,
        lambda a: a.T,
        lambda a: a[:, ::-1],
        lambda a: np.log(-a),
        lambda a: a.reshape(4, 9),
        lambda a: None,
        lambda a: a + 2,
    ]
    assert [row_order(f, [(4, 9)], (4, 9)) for f in others] == [None] * len(others)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good.gguf", {"first": (random(4, 32), "Q8_0"), "last": (random(4, 32), "F32")})


def test_truncated_data(good: Path) -> None:
    size = good.stat().st_size
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(
        ModelError,
        match=rf"good.gguf is truncated: tensor 'last' takes bytes {size - 512} to {size}, and the file has {size - 100}",
    ):
        open_gguf(good)


def test_truncated_anywhere_in_the_head(good: Path) -> None:
    content = good.read_bytes()
    head = content.index(b"last") + 4 + 4 + 16 + 12
    for cut in range(1, head, 3):
        good.write_bytes(content[:cut])
        with pytest.raises(ModelError, match=r"good.gguf is truncated: .* at byte \d+ runs past its \d+ bytes|is not a GGUF"):
            open_gguf(good)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: b"", ModelError, r"is empty"),
        (lambda c: b"PK\3\4" + c[4:], ModelError, r"is not a GGUF file: it starts with b'PK"),
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], UnsupportedError, r"is a version 1 GGUF"),
        (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], UnsupportedError, r"is a big-endian GGUF"),
        (lambda c: c[:8] + struct.pack("<Q", 1 << 60) + c[16:], ModelError, r"truncated|damaged"),
        (lambda c: c.replace(b"general.architecture", b"general.xrchitecture"), ModelError, r"no general.architecture"),
    ],
)
def test_damaged(good: Path, change: Any, error: type[Exception], message: str) -> None:
    good.write_bytes(change(good.read_bytes()))
    with pytest.raises(error, match=message):
        open_gguf(good)


def test_unknown_block_types_are_named_all_at_once(good: Path) -> None:
    content = good.read_bytes()
    for name, kind in ((b"first", 16), (b"last", 77)):
        at = content.index(name) + len(name) + 4 + 16
        content = content[:at] + struct.pack("<I", kind) + content[at + 4 :]
    good.write_bytes(content)
    with pytest.raises(UnsupportedError, match=r"IQ2_XXS \(first\); ggml type 77 \(last\)\. Use a file with Q4_0"):
        open_gguf(good)


def test_split_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"a": (random(2, 32), "F32")}, {"split.count": 3, "split.no": 1})
    with pytest.raises(UnsupportedError, match=r"is part 2 of 3: join the parts with `llama-gguf-split --merge"):
        open_gguf(path)
