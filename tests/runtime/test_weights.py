"""Mapped weights: right values for every dtype, no copy, and one sentence for a file that is damaged."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmc.errors import ArtifactError
from llmc.manifest import TensorInfo
from llmc.runtime.tensors import storage_dtype, tensor, zeros
from llmc.runtime.weights import WeightFile, map_weights

from .files import write_safetensors

RNG = np.random.default_rng(4)
ARRAYS = {
    "a": RNG.normal(size=(3, 5)).astype(np.float32),
    "b": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "c": RNG.integers(0, 255, (2, 3, 4)).astype(np.uint8),
    "d": RNG.normal(size=(1, 1)).astype(np.float16),
    "e": np.zeros((0, 4), np.float32),
}
NAMES = {"a": "float32", "b": "bfloat16", "c": "uint8", "d": "float16", "e": "float32"}


def infos() -> dict[str, TensorInfo]:
    return {k: TensorInfo("w.safetensors", NAMES[k], list(v.shape), NAMES[k], NAMES[k]) for k, v in ARRAYS.items()}


def test_every_dtype_is_mapped_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, ARRAYS)
    mapped = map_weights(tmp_path, infos(), list("ebadc"))
    for name, (array, dtype) in zip("ebadc", mapped, strict=True):
        assert dtype == NAMES[name]
        assert array.tobytes() == ARRAYS[name].tobytes()
        assert array.shape == ARRAYS[name].shape
        assert not array.flags.owndata
    # private: writing to the map leaves the file as it was
    mapped[2][0][0, 0] = 99
    assert WeightFile(path).array("a")[0][0, 0] == ARRAYS["a"][0, 0]


def test_the_reader_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write_safetensors(tmp_path / "w.safetensors", {k: v for k, v in ARRAYS.items() if k != "b"})
    for name, array in load_file(tmp_path / "w.safetensors").items():
        if not name.startswith("__pad"):
            np.testing.assert_array_equal(WeightFile(tmp_path / "w.safetensors").array(name)[0], array)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "w.safetensors"
    write_safetensors(whole, {k: ARRAYS[k] for k in "abcd"})
    data = whole.read_bytes()
    for size in (0, 3, 8, 40, len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"w\.safetensors.*(truncated|damaged).*recompile"):
            map_weights(tmp_path, infos(), list("abcd"))


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"

    def entry(**changes: object) -> None:
        write_safetensors(path, ARRAYS, {"a": changes})

    for changes in ({"dtype": "F99"}, {"shape": "x"}, {"data_offsets": [0]}, {"shape": [4, 5]}, {"data_offsets": [-60, 0]}):
        entry(**changes)
        with pytest.raises(ArtifactError, match=r"w\.safetensors .*a\b"):
            WeightFile(path).array("a")
    path.write_bytes((10).to_bytes(8, "little") + b"not json!!")
    with pytest.raises(ArtifactError, match="damaged header"):
        WeightFile(path)
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        WeightFile(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        WeightFile(tmp_path / "none.safetensors")
    body = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes((len(body)).to_bytes(8, "little") + body + bytes(4))
    with pytest.raises(ArtifactError, match="not a multiple of 64"):
        WeightFile(path).array("a")


def test_the_manifest_must_agree(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", ARRAYS)
    wrong = infos()
    wrong["a"].shape = [5, 3]
    with pytest.raises(ArtifactError, match=r"a as float32 \[3, 5\], and the manifest says float32 \[5, 3\]"):
        map_weights(tmp_path, wrong, ["a"])
    with pytest.raises(ArtifactError, match="lists no weight z"):
        map_weights(tmp_path, wrong, ["z"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "int64", "bool"])
def test_tensors_carry_any_dtype_over_the_same_memory(dtype: str) -> None:
    array = zeros((3, 5), dtype)
    assert array.ctypes.data % 64 == 0
    assert not array.any()
    made = tensor(array, dtype)
    assert str(made.dtype) == dtype
    assert tuple(made.shape) == (3, 5)
    if array.dtype.name == dtype:
        back = np.from_dlpack(made)
        back[1, 2] = 1
        assert array[1, 2] == 1


def test_bfloat16_round_trip_through_torch() -> None:
    import torch

    bits = zeros((4,), "bfloat16")
    bits[:] = np.array([1.5, -2.0, 0.0, 3e38], ml_dtypes.bfloat16).view(np.uint16)
    seen = torch.from_dlpack(tensor(bits, "bfloat16"))
    assert seen.dtype == torch.bfloat16
    assert seen.tolist() == [float(x) for x in bits.view(ml_dtypes.bfloat16)]
    bits[0] = np.array(7.0, ml_dtypes.bfloat16).view(np.uint16)
    assert seen[0].item() == 7.0


def test_a_tensor_keeps_its_memory_and_gives_it_back() -> None:
    import weakref

    class Owner(np.ndarray):
        """An array that can be watched."""

    array = zeros((1000,), "float32").view(Owner)
    array[:] = 3
    watch = weakref.ref(array)
    made = tensor(array, "float32")
    del array
    gc.collect()
    assert watch() is not None
    assert np.from_dlpack(made).sum() == 3000
    del made
    gc.collect()
    assert watch() is None


def test_unfit_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="aligned"):
        tensor(zeros((100,), "float32")[1:], "float32")
    with pytest.raises(ValueError, match="contiguous"):
        tensor(zeros((8, 32), "float32")[:, ::2], "float32")
    with pytest.raises(ValueError, match="bfloat16 tensor needs"):
        tensor(zeros((4,), "float32"), "bfloat16")
    assert storage_dtype("bfloat16") == np.uint16
