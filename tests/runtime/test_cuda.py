"""What of the CUDA runtime can be checked without a GPU; with one (``pytest -m gpu``), a whole model against transformers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.errors import ArtifactError, MissingExtraError, RequestError
from llmc.manifest import Limits
from llmc.runtime import load, loading
from llmc.runtime.artifact import open_artifact
from llmc.runtime.batch import Step
from llmc.runtime.device import cuda_devices
from llmc.runtime.footprint import footprint
from llmc.runtime.gpu import cudart
from llmc.runtime.gpu.cuda import CudaExecutor
from llmc.runtime.gpu.cudart import Cuda, DeviceTensors, Piece
from llmc.runtime.gpu.executor import _RESERVE, GpuExecutor, StepTimer, _Arguments
from llmc.runtime.library import load_runtime
from llmc.runtime.model import Model
from tests.runtime import module
from tests.runtime.fake_cuda import FakeCuda, install
from tests.runtime.toy import manifest


def test_a_tensor_over_device_memory_says_where_it_is() -> None:
    tensor = DeviceTensors(load_runtime(), 1).tensor(0x7F0000001000, (3, 5), "bfloat16")
    assert (tuple(tensor.shape), str(tensor.dtype), str(tensor.device)) == ((3, 5), "bfloat16", "cuda:1")
    assert tuple(tensor.strides) == (5, 1)


def test_without_cudart_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "find_cudart", lambda: None)
    with pytest.raises(MissingExtraError, match=r"pip install nvidia-cuda-runtime==13"):
        Cuda(0)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_step_arguments_have_fixed_places_and_a_table_of_fixed_width() -> None:
    memory: Any = FakeCuda()
    arguments = _Arguments(memory, manifest(5, 8, Limits(4, 16, 4)))
    step = Step(ints(4, 2), ints(0, 0), ints(3, 9), ints(0, 1, 2), ints(1, 1), np.array([[7], [8]], np.int32), None)
    arguments.put(step)
    memory.synchronize()
    shapes = arguments.shapes
    width = arguments.table_width
    assert shapes["block_table"] == (2, width) and "logit_rows" not in shapes

    def there(name: str) -> np.ndarray:
        address = arguments.address + arguments.offset[name]
        count = int(np.prod(shapes[name]))
        return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address)).reshape(shapes[name])

    np.testing.assert_array_equal(there("slot_mapping"), [3, 9])
    np.testing.assert_array_equal(there("block_table")[:, 0], [7, 8])
    assert there("block_table").shape[1] == width
    assert memory.copied[-1] == arguments.offset["block_table"] + 4 * 2 * width
    assert all(offset % 256 == 0 for offset in arguments.offset.values())


def test_threads_are_refused_for_a_gpu() -> None:
    artifact: Any = SimpleNamespace(variant=SimpleNamespace(kind="cuda", target="cuda:sm_90a"))
    with pytest.raises(RequestError, match="threads=2 cannot be: cuda:sm_90a computes on the GPU"):
        loading._device(artifact, 2)


PROMPTS = [[1, 2, 3], [4] * 11, [5], [10, 9, 8, 7, 6], [0]]
SAMPLED: list[dict[str, Any]] = [
    {"max_tokens": 9},
    {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 5},
    {
        "max_tokens": 8,
        "temperature": 2.0,
        "top_k": 4,
        "min_p": 0.01,
        "seed": 1,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
    },
]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[FakeCuda]:
    return install(monkeypatch, module.PAGE_SIZE)


def on_gpu(artifact: Path, pages: int = 24, **options: Any) -> Model:
    opened = open_artifact(artifact)
    return Model(opened.manifest, CudaExecutor(opened, pages, **options), artifact)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("options", SAMPLED)
def test_a_device_that_samples_and_runs_ahead_gives_the_hosts_text(
    options: dict[str, Any], graphs: bool, artifact: Path, gpus: list[FakeCuda]
) -> None:
    with load(artifact, max_batch=3) as host, on_gpu(artifact, graphs=graphs) as device:
        for n in (1, 2, 5):
            want = host.generate(PROMPTS, n=n, **options)
            found = device.generate(PROMPTS, n=n, **options)
            assert [c.token_ids for c in found] == [c.token_ids for c in want]
            assert [c.finish_reason for c in found] == [c.finish_reason for c in want]
            assert device.pages.used == 0
        # where the host must see logits, it samples between steps whose tokens the device chose
        mixed = device.generate(PROMPTS[0], logprobs=1, **options)
        assert mixed.token_ids == host.generate(PROMPTS[0], **options).token_ids
        np.testing.assert_allclose(device.logits(PROMPTS[1]), host.logits(PROMPTS[1]), rtol=1e-6)
    assert bool(gpus[-1].launched) == graphs


def test_a_token_waits_for_nothing_and_a_batch_size_is_recorded_once(
    artifact: Path, gpus: list[FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens there are, the host waits for the whole device no more often, and for a step only when the next one is
    under way; graphs are recorded when a batch size comes the second time, and never again."""
    waits: list[bool] = []
    recorded: list[int] = []
    whole, capture, wait = FakeCuda.synchronize, FakeCuda.capture, FakeCuda.wait

    def waiting(gpu: FakeCuda, event: int) -> None:
        waits.append(gpu._events[event] < gpu._asked)
        wait(gpu, event)

    monkeypatch.setattr(FakeCuda, "synchronize", lambda gpu: (waits.append(False), whole(gpu))[1])
    monkeypatch.setattr(FakeCuda, "capture", lambda gpu, work: (recorded.append(1), capture(gpu, work))[1])
    monkeypatch.setattr(FakeCuda, "wait", waiting)
    with on_gpu(artifact) as device:

        def idle(tokens: int) -> int:
            waits.clear()
            device.generate(PROMPTS[0], max_tokens=tokens, ignore_eos=True)
            return waits.count(False)

        few = idle(5)
        assert idle(20) == few and waits.count(True) >= 15 and len(recorded) == 1
        device.generate(PROMPTS[:2], max_tokens=8, ignore_eos=True)
        device.generate(PROMPTS[:2], max_tokens=8, ignore_eos=True)
        assert len(recorded) == 2


def test_streams_that_share_a_device_do_not_disturb_each_other(artifact: Path, gpus: list[FakeCuda]) -> None:
    with load(artifact) as host, on_gpu(artifact) as device:
        want = [host.generate(p, max_tokens=10).token_ids for p in PROMPTS[:3]]
        streams = [device.generate(p, max_tokens=10, stream=True) for p in PROMPTS[:3]]
        found: list[list[int]] = [[], [], []]
        for _ in range(10):
            for i, stream in enumerate(streams):
                found[i] += next(stream).token_ids
        assert found == want
        left = device.generate(PROMPTS[3], max_tokens=20, stream=True)
        next(left)
        left.close()
        assert device.pages.used == 0
        assert device.generate(PROMPTS[0], max_tokens=10).token_ids == want[0]


def test_pages_run_out_while_steps_are_in_flight(artifact: Path, gpus: list[FakeCuda]) -> None:
    with load(artifact, max_batch=3) as host:
        want = [c.token_ids for c in host.generate(PROMPTS, max_tokens=14)]
    for pages in (7, 9, 12):
        with on_gpu(artifact, pages) as device:
            assert [c.token_ids for c in device.generate(PROMPTS, max_tokens=14)] == want
            assert device.pages.used == 0


def test_the_block_table_is_sent_once_and_then_only_its_new_entries(artifact: Path, gpus: list[FakeCuda]) -> None:
    with on_gpu(artifact) as device:
        device.generate([1, 2], max_tokens=20)
        # the prompt's step and the first decode step send all arrays; each later page is one entry
        small = [n for n in gpus[-1].copied if n <= 16]
        assert small == [4] * (22 // module.PAGE_SIZE)
        assert len(gpus[-1].copied) - len(small) == 2


def test_every_position_has_its_slot_while_steps_are_in_flight(
    artifact: Path, gpus: list[FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first ones of pages, whose entry of the block table comes while steps are in flight."""
    forward, found = GpuExecutor._forward, []

    def watched(self: GpuExecutor, phase: str, rows: int) -> None:
        arguments = self._arguments
        width = arguments.table_width

        def look() -> None:
            def there(name: str, count: int) -> np.ndarray:
                address = arguments.address + arguments.offset[name]
                return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address)).copy()

            at, table = there("positions", rows), there("block_table", rows * width).reshape(rows, width)
            own = table[np.arange(rows), at // module.PAGE_SIZE] * module.PAGE_SIZE + at % module.PAGE_SIZE
            found.append((there("slot_mapping", rows).tolist(), own.tolist()))

        if phase == "decode":
            gpus[-1].enqueue(look)
        forward(self, phase, rows)

    monkeypatch.setattr(GpuExecutor, "_forward", watched)
    for pages in (7, 24):
        with on_gpu(artifact, pages, graphs=False) as device:
            device.generate([[1, 2], [3, 4, 5], [6] * 7], max_tokens=11)
    assert len(found) > 20
    assert all(slots == own and len(set(slots)) == len(slots) for slots, own in found)


class Streams(Cuda):
    """A driver without a GPU that notes what it waits for."""

    def __init__(self, stream: int, waited: list[int], device: int = 3) -> None:
        self.device, self.stream, self._waited = device, stream, waited
        self._events, self._pinned, self._allocations = [], [], []

    def _call(self, name: str, *arguments: Any) -> None:
        if name == "StreamSynchronize":
            self._waited.append(arguments[0].value)


def test_models_of_a_process_take_turns_on_a_device() -> None:
    waited: list[int] = []
    one, other = Streams(5, waited), Streams(6, waited)
    for driver in (one, one, other, one):
        with driver.turn():
            pass
    assert waited == [5, 6]
    one.close()
    with other.turn():
        pass
    assert waited == [5, 6, 5]
    other.close()


def in_order(one: Streams, other: Streams, most: float | None) -> list[str]:
    """The order in which a thread gets a turn of ``other`` and this one ends a turn of ``one``, in which it waits for that thread,
    at most ``most`` seconds."""
    said = []

    def second() -> None:
        with other.turn():
            said.append("second")

    thread = Thread(target=second)
    with one.turn():
        thread.start()
        thread.join(most)
        said.append("first")
        with one.turn():  # a turn within a turn is the same
            pass
    thread.join()
    return said


def test_a_thread_waits_for_the_turn_of_another() -> None:
    one, other = Streams(5, []), Streams(6, [])
    assert in_order(one, other, 0.1) == ["first", "second"]
    one.close()
    other.close()


def test_another_gpu_is_not_waited_for() -> None:
    waited: list[int] = []
    one, other = Streams(5, waited), Streams(6, waited, device=4)
    assert in_order(one, other, None) == ["second", "first"] and not waited
    one.close()
    other.close()


def test_device_time_is_that_of_the_steps(artifact: Path, gpus: list[FakeCuda]) -> None:
    with on_gpu(artifact) as device:
        executor: Any = device._executor
        executor.timer = StepTimer(executor.driver)
        device.generate([1, 2], max_tokens=5)
        # a prompt step of two pieces of work, four decode steps of three
        assert executor.timer.seconds() == pytest.approx((2 + 4 * 3) * 1e-6)
        assert executor.timer.seconds() == 0


class Uploads(Cuda):
    """The upload of :class:`Cuda` with a library that copies within this machine's memory."""

    def __init__(self) -> None:
        self.device, self._memory, self._pinned = 0, [], []
        self.copied: list[int] = []

    def pinned(self, nbytes: int) -> np.ndarray:
        self._memory.append(np.zeros(nbytes, np.uint8))
        self._pinned.append(self._memory[-1].ctypes.data)
        return self._memory[-1]

    def _call(self, name: str, *arguments: Any) -> None:
        if name == "MemcpyAsync":
            target, source, count = arguments[:3]
            ctypes.memmove(target, source, count.value)
            self.copied.append(count.value)


def test_an_upload_puts_every_byte_of_a_file_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_UPLOAD_BYTES", 1000)
    data = np.random.default_rng(0).integers(0, 256, 9000, np.uint8)
    (tmp_path / "a").write_bytes(data[:5500].tobytes())
    (tmp_path / "b").write_bytes(data[5500:].tobytes())
    device, gpu = np.zeros(9000, np.uint8), Uploads()
    at = device.ctypes.data
    pieces = [
        Piece(at, tmp_path / "a", 100, 2500),
        Piece(at + 3000, tmp_path / "b", 0, 3500),
        Piece(at + 7000, tmp_path / "a", 0, 1),
    ]
    gpu.upload(pieces)
    want = np.zeros(9000, np.uint8)
    want[:2500], want[3000:6500], want[7000] = data[100:2600], data[5500:9000], data[0]
    np.testing.assert_array_equal(device, want)
    assert sorted(gpu.copied) == [1, 500, 500, *[1000] * 5] and not gpu._pinned
    with pytest.raises(ArtifactError, match=r"the weights .*b are truncated"):
        gpu.upload([Piece(at, tmp_path / "b", 3000, 501)])


def test_a_model_takes_what_the_gpu_has_free(artifact: Path, gpus: list[FakeCuda], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_artifact(artifact)
    opened = replace(opened, variant=replace(opened.variant, kind="cuda"))
    monkeypatch.setattr(loading, "open_artifact", lambda path: opened)
    page = opened.manifest.kv.bytes_per_token * module.PAGE_SIZE
    needs = footprint(opened.manifest, opened.variant).total + _RESERVE
    monkeypatch.setattr(FakeCuda, "total", needs + 7 * page + 5)
    with load(artifact) as model:
        assert model.pages.num_pages == 7 and model.context == 7 * module.PAGE_SIZE
        # what the plan says is what was taken
        taken = gpus[-1].used - 7 * page
        assert abs(taken - (needs - _RESERVE)) < 0.02 * taken
        assert model.generate(PROMPTS[0], max_tokens=3).token_ids
        assert model.executor.bandwidth() > 0
    monkeypatch.setattr(FakeCuda, "total", needs + page - 3)
    with pytest.raises(RequestError, match="the GPU lacks 3 bytes for this model and one page"):
        load(artifact)


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
