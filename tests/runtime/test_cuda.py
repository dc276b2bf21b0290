"""What of the CUDA runtime can be checked without a GPU; with one (``pytest -m gpu``), a whole model against transformers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.errors import MissingExtraError, RequestError
from llmc.manifest import Limits
from llmc.runtime import cuda, cudart, load, loading
from llmc.runtime.batch import Step
from llmc.runtime.cudart import Cuda, DeviceTensors
from llmc.runtime.device import cuda_devices
from llmc.runtime.library import load_runtime
from tests.runtime.toy import manifest


def test_a_tensor_over_device_memory_says_where_it_is() -> None:
    tensor = DeviceTensors(load_runtime(), 1).tensor(0x7F0000001000, (3, 5), "bfloat16")
    assert (tuple(tensor.shape), str(tensor.dtype), str(tensor.device)) == ((3, 5), "bfloat16", "cuda:1")
    assert tuple(tensor.strides) == (5, 1)


def test_without_cudart_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "find_cudart", lambda: None)
    with pytest.raises(MissingExtraError, match=r"pip install nvidia-cuda-runtime==13"):
        Cuda(0)


class HostMemory:
    """Stands for :class:`Cuda`: device memory is host memory."""

    def __init__(self) -> None:
        self.copied = 0
        self._blocks: list[np.ndarray] = []

    def pinned(self, nbytes: int) -> np.ndarray:
        self._blocks.append(np.full(nbytes, 77, np.uint8))
        return self._blocks[-1]

    def allocate(self, nbytes: int, zero: bool = False) -> int:
        return int(self.pinned(nbytes).ctypes.data)

    def copy_in(self, target: int, source: np.ndarray) -> None:
        ctypes.memmove(target, source.ctypes.data, source.nbytes)
        self.copied = source.nbytes


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_step_arguments_have_fixed_places_and_a_table_of_fixed_width() -> None:
    memory: Any = HostMemory()
    arguments = cuda._Arguments(memory, manifest(5, 8, Limits(4, 16, 4)))
    step = Step(ints(4, 2), ints(0, 0), ints(3, 9), ints(0, 1, 2), ints(1, 1), np.array([[7], [8]], np.int32), None)
    shapes = arguments.put(step)
    width = arguments.table_width
    assert shapes["block_table"] == (2, width) and "logit_rows" not in shapes

    def there(name: str) -> np.ndarray:
        address = arguments.address + arguments.offset[name]
        count = int(np.prod(shapes[name]))
        return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address)).reshape(shapes[name])

    np.testing.assert_array_equal(there("slot_mapping"), [3, 9])
    np.testing.assert_array_equal(there("block_table")[:, 0], [7, 8])
    assert there("block_table").shape[1] == width
    assert memory.copied == arguments.offset["block_table"] + 4 * 2 * width
    assert all(offset % 256 == 0 for offset in arguments.offset.values())


def test_threads_are_refused_for_a_gpu() -> None:
    artifact: Any = SimpleNamespace(variant=SimpleNamespace(kind="cuda", target="cuda:sm_90a"))
    with pytest.raises(RequestError, match="threads=2 cannot be: cuda:sm_90a computes on the GPU"):
        loading._device(artifact, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_on_the_gpu(dtype: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from llmc.compiler import compile as compile_model
    from llmc.reference import reference_model

    folder = tiny_model_dir("llama")
    arch = cuda_devices()[0].arch
    compile_model(str(folder), out=tmp_path / "artifact", target=f"cuda:{arch}", dtype=dtype, context=64)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 200, 40)]
    expected = reference_model(str(folder)).logits(ids)
    with load(tmp_path / "artifact") as model:
        found = model.logits(ids)
        assert np.abs(found - expected).max() < {"float32": 1e-4}.get(dtype, 3e-2) * np.abs(expected).max()
        first = model.generate(ids[:8], max_tokens=8, temperature=0.0)
        assert first.token_ids == model.generate(ids[:8], max_tokens=8, temperature=0.0).token_ids
